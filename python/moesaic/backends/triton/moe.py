"""Rows of the triton backend: moe."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ... import registry
from ._launch import FLOATS, on_its_device, short, why_not_device, why_not_floats


def _named(args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(registry.ops()["fused_topk"].arguments, args, strict=True))


def _why_not_topk(*args: Any) -> str | None:
    from ...kernels.moe.topk import MAX_EXPERTS

    given = _named(args)
    logits = given["router_logits"]
    if logits.shape[1] > MAX_EXPERTS:
        return f"it serves up to {MAX_EXPERTS} experts, not {logits.shape[1]}"
    if given["weights_dtype"] not in FLOATS:
        return f"it writes float32, bfloat16 and float16, not {short(given['weights_dtype'])}"
    inputs = (logits, given["e_score_correction_bias"], given["per_expert_scale"])
    return why_not_device(logits) or why_not_floats(*inputs)


def _fused_topk(*args: Any) -> tuple[Tensor, Tensor]:
    from ...kernels.moe.topk import fused_topk

    return fused_topk(**_named(args))


registry.implement("fused_topk", "triton", on_its_device(_fused_topk), _why_not_topk)
