"""The model on moesaic's ops, and the decoding loop that it shares with the stock model.

The model stays transformers' LlamaForCausalLM. Swapped are its parts: linears for
:class:`moesaic.nn.QuantLinear`, MLPs for :class:`moesaic.nn.FusedMoE`, attention for paged
attention and its cache for :class:`PagedCache`, through public extension points of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import formats
from ..formats import QuantFormat
from ..integrations import transformers as integration
from ..nn import FusedMoE, QuantLinear
from ..ops.quant import quantize
from .moeify import ExpertSplit
from .types import Block, Cache, Model

#: The choices of --weights: the format of experts and linears (None: not quantized), that of the
#: embedding and the output matrix that is tied to it (they suffer most from FP4), the dtype of what
#: is not quantized, and of the KV cache.
WEIGHTS: dict[str, tuple[QuantFormat | None, QuantFormat | None, torch.dtype]] = {
    "mxfp4": (formats.MXFP4, formats.FP8_ROW, torch.bfloat16),
    "fp8": (formats.FP8_BLOCK_128X128, formats.FP8_ROW, torch.bfloat16),
    "bf16": (None, None, torch.bfloat16),
    "fp32": (None, None, torch.float32),
}

CacheFactory = Callable[[], "Cache"]


class Embedding(nn.Module):
    """A token embedding held quantized by rows, or in the checkpoint's dtype; read in ``dtype``."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, fmt: QuantFormat | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.format = dtype, fmt
        scale = None
        if fmt is not None:
            quantized = quantize(weight, fmt)
            # Codes are kept as bytes: a module's conversion to another dtype must not touch them.
            weight, scale = quantized.data.view(torch.uint8), quantized.scale
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.weight)
        if self.format is None or self.scale is None:
            return rows.to(self.dtype)
        values = rows.view(self.format.data_dtype).to(torch.float32) * self.scale[ids]
        return values.to(self.dtype)


class Attention(nn.Module):
    """LlamaAttention with one matrix for queries, keys and values, rotated together."""

    def __init__(self, old: Block, linear: Callable[[Tensor], QuantLinear]) -> None:
        super().__init__()
        self.layer_idx: int = old.layer_idx
        self.head_dim: int = old.head_dim
        self.scaling: float = old.scaling
        parts = (old.q_proj.weight, old.k_proj.weight, old.v_proj.weight)
        self.heads = [len(weight) // old.head_dim for weight in parts]
        self.qkv_proj = linear(torch.cat(parts))
        self.o_proj = linear(old.o_proj.weight)

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None, past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        queries, keys, values = self.heads
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        cos, sin = (t.unsqueeze(1) for t in position_embeddings)
        rotated, v = heads.split((queries + keys, values), dim=1)
        first, second = rotated.chunk(2, dim=-1)
        rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
        q, k = rotated.split((queries, keys), dim=1)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out, _ = integration.attention(self, q, k, v, attention_mask, scaling=self.scaling)
        return self.o_proj(out.flatten(2)), None


@torch.no_grad()
def swap_in(model: Model, splits: Sequence[ExpertSplit], weights: str, top_k: int) -> Model:
    """Replace the parts of a dense, bias-free Llama model in place by moesaic's; returns it.

    weights: a key of :data:`WEIGHTS`.
    """
    integration.register()
    fmt, head_fmt, held = WEIGHTS[weights]

    def linear(weight: Tensor, fmt: QuantFormat | None = fmt) -> QuantLinear:
        return QuantLinear(weight if fmt is not None else weight.to(held), format=fmt)

    for layer, split in zip(model.model.layers, splits, strict=True):
        layer.self_attn = Attention(layer.self_attn, linear)
        w13, w2 = split.weights(layer.mlp)
        if fmt is None:
            w13, w2 = w13.to(held), w2.to(held)
        layer.mlp = FusedMoE(
            w13, w2, split.router_weight.to(w13.device, model.dtype),
            split.router_bias.to(w13.device, model.dtype), top_k=top_k, format=fmt,
            unit_weights=True,
        )  # fmt: skip
    model.lm_head = linear(model.lm_head.weight, head_fmt)
    embedding = model.model.embed_tokens.weight.detach()
    model.model.embed_tokens = Embedding(
        embedding if head_fmt else embedding.to(held), head_fmt, model.dtype
    )
    model.set_attn_implementation(integration.NAME)
    return model


def set_top_k(model: Model, top_k: int) -> None:
    """Choose how many experts each token takes."""
    for layer in model.model.layers:
        layer.mlp.top_k = top_k


def weight_nbytes(model: nn.Module) -> int:
    """Bytes of a model's weights as they are held; a tensor with two names counts once."""
    total, seen = 0, set()
    for module in model.modules():
        if isinstance(module, (QuantLinear, FusedMoE)):
            total += module.weight_nbytes()
            continue
        for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if t.data_ptr() not in seen:
                seen.add(t.data_ptr())
                total += t.nbytes
    return total


def paged_cache(model: Model, weights: str, max_tokens: int) -> integration.PagedCache:
    """An empty paged cache for one sequence of up to ``max_tokens``."""
    return integration.PagedCache(
        model.config, max_tokens=max_tokens, dtype=WEIGHTS[weights][2], device=model.device
    )


def cache_nbytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds, whole pages where it is paged."""
    if isinstance(cache, integration.PagedCache):
        return cache.pages.nbytes_used
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@torch.inference_mode()
def prefill(model: Model, cache: Cache, ids: Tensor) -> int:
    """Feed the tokens [n] and return the most likely next one."""
    out = model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return int(out.logits[0, -1].argmax())


@torch.inference_mode()
def decode(model: Model, cache: Cache, token: int) -> Iterator[int]:
    """Greedy decoding without end after ``token``: yields each next token."""
    while True:
        ids = torch.tensor([[token]], device=model.device)
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = int(out.logits[0, -1].argmax())
        yield token
