"""Rows of the reference backend: moe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ... import registry
from ...ops import _weights
from ...reference import moe as reference


def _with_weights(op: str, *weights: str) -> Callable[..., Any]:
    """The definition of ``op`` for flat arguments in which the named weights are flattened."""
    function = getattr(reference, op)

    def call(**kwargs: Any) -> Any:
        for name in weights:
            parts = {k: kwargs.pop(f"{name}_{k}") for k in _weights.FIELDS}
            kwargs[name] = _weights.unflatten(**parts)
        return function(**kwargs)

    return registry.by_name(op, call)


for _op in (
    "fused_topk",
    "moe_sort",
    "moe_align_block_size",
    "moe_permute",
    "moe_unpermute",
    "moe_activation",
):
    registry.implement(_op, "reference", registry.by_name(_op, getattr(reference, _op)))
registry.implement("grouped_mm", "reference", _with_weights("grouped_mm", "weight"))
registry.implement("fused_experts", "reference", _with_weights("fused_experts", "w13", "w2"))
