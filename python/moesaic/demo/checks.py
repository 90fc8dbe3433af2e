"""What the demo proves about its numbers: all experts make the dense model, and who ran each op."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import moesaic

from .model import load_model
from .moeify import ExpertSplit
from .runtime import paged_cache, swap_in
from .types import Model


@torch.inference_mode()
def matches_dense(
    folder: Path, splits: Sequence[ExpertSplit], tokens: Tensor
) -> tuple[float, float]:
    """Run all experts on unquantized fp32 weights beside the dense model, on tokens [n].

    Returns (error of moesaic's logits, error of transformers' fp32 logits): largest differences
    from transformers' fp64 logits. The first is fp32 rounding if it is at most twice the second.
    """
    dense = load_model(folder, torch.float32)
    stock = dense(tokens[None].cpu()).logits[0]
    experts = swap_in(dense, splits, "fp32", len(splits[0].neurons)).to(tokens.device)
    cache = paged_cache(experts, "fp32", len(tokens))
    ours = experts(tokens[None], past_key_values=cache, use_cache=True).logits[0].cpu()
    exact = load_model(folder, torch.float64)(tokens[None].cpu()).logits[0]
    return (ours - exact).abs().max().item(), (stock - exact).abs().max().item()


def who_runs(model: Model, weights: str) -> list[tuple[str, str]]:
    """(op, the backend and instruction set that serve it in a decoding step of the model)."""
    layer, config = model.model.layers[0], model.config
    cache = paged_cache(model, weights, 16).pages
    cache.allocate(0)
    step = cache.append({0: 1})
    like = dict(dtype=model.dtype, device=model.device)
    x = torch.zeros(1, config.hidden_size, **like)
    q = torch.zeros(1, config.num_attention_heads, config.head_dim, **like)
    kv = torch.zeros(1, config.num_key_value_heads, config.head_dim, **like)
    logits = torch.zeros(1, len(layer.mlp.router_weight), **like)
    ones = torch.ones(1, layer.mlp.top_k, device=model.device)
    ids = torch.arange(layer.mlp.top_k, device=model.device, dtype=torch.int32)[None]
    experts = [layer.mlp.packed_weight(name) for name in ("w13", "w2")]
    linear = layer.self_attn.qkv_proj.packed_weight("weight")
    calls = {
        "quant_linear": (x, linear),
        "fused_topk": (logits, layer.mlp.top_k),
        "fused_experts": (x, *experts, ones, ids),
        "reshape_and_cache": (kv, kv, cache.k[0], cache.v[0], step.slot_mapping),
        "paged_attention": (q, cache.k[0], cache.v[0], step.block_table, step.seq_lens),
    }
    return [(op, _chosen(moesaic.explain(op, *args))) for op, args in calls.items()]


def _chosen(explanation: str) -> str:
    """'cpu (avx2)' from the line that ``moesaic.explain`` marks with an arrow."""
    for line in explanation.splitlines():
        mark, _, rest = line.strip().partition(" ")
        if mark == "->":
            return " ".join(word for word in rest.split() if word != "yes")
    return explanation.splitlines()[0].partition(": ")[2]
