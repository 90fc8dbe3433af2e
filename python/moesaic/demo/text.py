"""English text that every Python carries: the language reference in ``pydoc_data.topics``.

One topic in four is held out; the router is fitted on the others.
"""

from __future__ import annotations

from torch import Tensor

from .types import Tokenizer


def windows(tokenizer: Tokenizer, count: int, length: int, *, held_out: bool) -> Tensor:
    """[count, length] int64 tokens of the held-out topics, or of the others."""
    from pydoc_data.topics import topics

    chosen = (
        text for i, (_, text) in enumerate(sorted(topics.items())) if (i % 4 == 0) == held_out
    )
    text = "\n\n".join(chosen)
    # Markup makes short tokens, but none is shorter than a character.
    ids = tokenizer(text[: count * length * 6], return_tensors="pt")["input_ids"][0]
    return ids[: count * length].view(count, length)
