"""Names for transformers' objects in annotations.

They are ``Any`` to type checkers: transformers may be absent where they run, and where it is
present its own annotations leave out what its classes can do.
"""

from __future__ import annotations

from typing import Any

Cache = Any
Model = Any  # LlamaForCausalLM
Block = Any  # LlamaMLP or LlamaAttention
Tokenizer = Any  # PreTrainedTokenizerBase
