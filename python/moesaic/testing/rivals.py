"""What users would run instead, called on the same inputs: PyTorch's own ops for now.

A rival gets its inputs prepared once (dequantized, gathered), outside the timing, whenever that is
how it would be used; each says what it is in its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = dict[str, Any]

#: A rival computes in bf16 somewhere: this relative L2 error still counts as the right answer.
RELATIVE_L2 = 3e-2


class NotServed(Exception):
    """The rival has no counterpart for this call."""


def _linear_inputs(inputs: Inputs) -> Inputs:
    """The weight dequantized to fp32 and bf16, as a user without quantized kernels holds it."""
    from ..ops.matmul import unpack_weight
    from ..ops.quant import dequantize

    weight = unpack_weight(inputs["weight"])
    dense = weight if isinstance(weight, Tensor) else dequantize(weight)
    return {**inputs, "dense": dense.float(), "dense16": dense.bfloat16()}


def _linear_fp32(inputs: Inputs) -> Tensor:
    return F.linear(inputs["x"].float(), inputs["dense"], inputs.get("bias"))


def _linear_bf16(inputs: Inputs) -> Tensor:
    bias = inputs.get("bias")
    return F.linear(
        inputs["x"].bfloat16(), inputs["dense16"], None if bias is None else bias.bfloat16()
    )


def _softmax_topk(inputs: Inputs) -> Tensor:
    if inputs.get("scoring_func", "softmax") != "softmax":
        raise NotServed("only softmax scores")
    weights, _ = torch.topk(inputs["router_logits"].float().softmax(-1), inputs["top_k"])
    return weights / weights.sum(-1, keepdim=True) if inputs.get("renormalize") else weights


def _dense_experts(inputs: Inputs) -> Inputs:
    return {**inputs, "w13": _dense_bf16(inputs["w13"]), "w2": _dense_bf16(inputs["w2"])}


@lru_cache(maxsize=8)
def _dense_bf16(weight: Any) -> Tensor:
    """Decoded once for all inputs that share the weight: a layer of experts is large."""
    from ..ops.matmul import unpack_weight
    from ..ops.quant import dequantize

    plain = weight if isinstance(weight, Tensor) else unpack_weight(weight)
    return plain.bfloat16() if isinstance(plain, Tensor) else dequantize(plain, torch.bfloat16)


def _experts_loop(inputs: Inputs) -> Tensor:
    """The expert loop of the usual eager MoE block, SwiGLU."""
    x, w13, w2 = inputs["hidden_states"].bfloat16(), inputs["w13"], inputs["w2"]
    weights, ids = inputs["topk_weights"], inputs["topk_ids"]
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], w13[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, w2[expert])
        out.index_add_(0, token, y.float() * weights[token, slot, None])
    return out


def _gathered(inputs: Inputs) -> Inputs:
    """Nothing prepared: gathering the pages is part of what the rival must do every step."""
    if inputs.get("cu_seqlens_q") is not None:
        raise NotServed("decode only")
    if any(inputs.get(name) is not None for name in ("sinks", "alibi_slopes", "k_scale")):
        raise NotServed("no sinks, ALiBi or quantized cache")
    return inputs


def _gather_sdpa(inputs: Inputs) -> Tensor:
    """Gather every sequence's pages, then scaled_dot_product_attention per sequence."""
    q, table, lengths = inputs["q"], inputs["block_table"], inputs["seq_lens"]
    k_cache, v_cache = inputs["k_cache"], inputs["v_cache"]
    scale = inputs.get("scale") or 1 / math.sqrt(q.shape[-1])
    out = []
    for row, length in enumerate(lengths.tolist()):
        pages = table[row, : -(-length // k_cache.shape[1])].long()
        k = k_cache[pages].flatten(0, 1)[:length].transpose(0, 1)
        v = v_cache[pages].flatten(0, 1)[:length].transpose(0, 1)
        out.append(
            F.scaled_dot_product_attention(
                q[row][None, :, None], k[None], v[None], scale=scale, enable_gqa=True
            )[0, :, 0]
        )
    return torch.stack(out)


_RIVALS: dict[str, dict[str, Callable[[Inputs], Tensor]]] = {
    "quant_linear": {"torch fp32 linear": _linear_fp32, "torch bf16 linear": _linear_bf16},
    "fused_topk": {"torch softmax + topk": _softmax_topk},
    "fused_experts": {"torch bf16 expert loop": _experts_loop},
    "paged_attention": {"torch gather + sdpa": _gather_sdpa},
}
_PREPARATIONS: dict[str, Callable[[Inputs], Inputs]] = {
    "quant_linear": _linear_inputs,
    "fused_experts": _dense_experts,
    "paged_attention": _gathered,
}


def of(op: str) -> dict[str, Callable[[Inputs], Tensor]]:
    """The rivals of an op by name."""
    return _RIVALS.get(op, {})


def preparation(op: str) -> Callable[[Inputs], Inputs]:
    """What is done once to the inputs of a rival, before the clock starts."""
    return _PREPARATIONS.get(op, lambda inputs: inputs)
