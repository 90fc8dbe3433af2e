"""Doors of the moe room.  What each op computes is defined in ``moesaic.reference.moe``."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..reference.moe import ACTIVATIONS
from . import _check, _weights
from ._weights import Weight

__all__ = [
    "fused_experts",
    "fused_moe",
    "fused_topk",
    "grouped_mm",
    "moe_activation",
    "moe_align_block_size",
    "moe_permute",
    "moe_sort",
    "moe_unpermute",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTS = (torch.int32, torch.int64)
_SCORING = ("softmax", "sigmoid", "sqrtsoftplus", "none")
_GROUP_SCORES = ("top2_sum", "max")


def _ids(op: str, argument: str, value: Any, like: Tensor, **kwargs: Any) -> Tensor:
    """Check ids and return them as contiguous int32; ids beyond int32 stay out of every range."""
    ids = _check.tensor(op, argument, value, dtypes=_INTS, like=like, **kwargs)
    if ids.dtype == torch.int64:
        ids = ids.clamp(-1, 2**31 - 1).to(torch.int32)
    return ids.contiguous()


def _optional_ids(op: str, argument: str, value: Any, like: Tensor, **kwargs: Any) -> Tensor | None:
    return None if value is None else _ids(op, argument, value, like, **kwargs)


def _floats(op: str, argument: str, value: Any, like: Tensor, **kwargs: Any) -> Tensor:
    return _check.tensor(op, argument, value, dtypes=_FLOATS, like=like, **kwargs)


def _optional_floats(
    op: str, argument: str, value: Any, like: Tensor, **kwargs: Any
) -> Tensor | None:
    return None if value is None else _floats(op, argument, value, like, **kwargs)


def _definition(function: Any) -> Any:
    """Give a door the docstring of its definition, and the note on ``backend`` that all doors
    share."""
    from ..reference import moe as reference

    text = getattr(reference, function.__name__).__doc__
    function.__doc__ = text.rstrip() + (
        '\n\n    backend: None (automatic), "cpu", "triton" or "reference".  Errors: ValueError and'
        "\n    TypeError naming the argument; NotImplementedError if a forced backend cannot serve"
        "\n    the call.\n    "
    )
    return function


registry.define(
    "fused_topk(Tensor router_logits, int top_k, str scoring_func, bool softmax_after_topk, "
    "bool renormalize, float renorm_eps, float routed_scaling_factor, "
    "Tensor? e_score_correction_bias, int num_expert_group, int topk_group, str group_score, "
    "Tensor? per_expert_scale, int num_fused_shared_experts, "
    "float shared_expert_weight, Tensor? token_mask, Tensor? topk_ids, Tensor? expert_map, "
    "ScalarType weights_dtype) -> (Tensor, Tensor)",
    room="moe",
    fake=lambda logits, top_k, *rest: (
        logits.new_empty(logits.shape[0], top_k + rest[10], dtype=rest[15]),
        logits.new_empty(logits.shape[0], top_k + rest[10], dtype=torch.int32),
    ),
)


@_definition
def fused_topk(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    softmax_after_topk: bool = False,
    renormalize: bool = False,
    renorm_eps: float = 1e-20,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    per_expert_scale: Tensor | None = None,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    token_mask: Tensor | None = None,
    topk_ids: Tensor | None = None,
    expert_map: Tensor | None = None,
    weights_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    op = "fused_topk"
    logits = _check.tensor(op, "router_logits", router_logits, ndim=2, dtypes=_FLOATS)
    tokens, experts = logits.shape
    if experts == 0:
        _check.fail(op, "router_logits", "at least one expert", _check.describe(logits))
    _check.integer(op, "top_k", top_k, 1, None if topk_ids is not None else experts)
    _check.choice(op, "scoring_func", scoring_func, _SCORING)
    _check.choice(op, "group_score", group_score, _GROUP_SCORES)
    _check.flag(op, "renormalize", renormalize)
    if _check.flag(op, "softmax_after_topk", softmax_after_topk) and scoring_func != "softmax":
        _check.fail(op, "softmax_after_topk", "False unless scoring_func is 'softmax'", True)
    _check.integer(op, "num_expert_group", num_expert_group, 1, experts)
    if experts % num_expert_group:
        _check.fail(op, "num_expert_group", f"a divisor of the {experts} experts", num_expert_group)
    _check.integer(op, "topk_group", topk_group, 1, num_expert_group)
    if topk_ids is None and topk_group * (experts // num_expert_group) < top_k:
        kept = f"{topk_group} groups of {experts // num_expert_group} experts"
        _check.fail(op, "topk_group", f"enough groups to choose {top_k} experts from", kept)
    bias = _optional_floats(
        op, "e_score_correction_bias", e_score_correction_bias, logits, shape=(experts,)
    )
    scale = _optional_floats(op, "per_expert_scale", per_expert_scale, logits, shape=(experts,))
    shared = _check.integer(op, "num_fused_shared_experts", num_fused_shared_experts, 0)
    mask = _check.optional_tensor(
        op, "token_mask", token_mask, shape=(tokens,), dtypes=(torch.bool,), like=logits
    )
    if mask is not None:
        mask = mask.contiguous()
    given = _optional_ids(op, "topk_ids", topk_ids, logits, shape=(tokens, top_k))
    mapped = _optional_ids(op, "expert_map", expert_map, logits, shape=(experts + shared,))
    if weights_dtype is None:
        wide = any(t is not None and t.dtype == torch.float64 for t in (logits, bias, scale))
        weights_dtype = torch.float64 if wide else torch.float32
    elif weights_dtype not in _FLOATS:
        _check.fail(op, "weights_dtype", _check.names(_FLOATS), weights_dtype, kind=TypeError)
    return registry.call(
        op, logits, top_k, scoring_func, softmax_after_topk, renormalize,
        _check.number(op, "renorm_eps", renorm_eps),
        _check.number(op, "routed_scaling_factor", routed_scaling_factor),
        bias, num_expert_group, topk_group, group_score, scale, shared,
        _check.number(op, "shared_expert_weight", shared_expert_weight),
        mask, given, mapped, weights_dtype, backend=backend,
    )  # fmt: skip


registry.define(
    "moe_sort(Tensor topk_ids, int num_experts) -> (Tensor, Tensor, Tensor)",
    room="moe",
    fake=lambda ids, experts: (
        ids.new_empty(ids.numel(), dtype=torch.int32),
        ids.new_empty(ids.shape, dtype=torch.int32),
        ids.new_empty(experts, dtype=torch.int32),
    ),
)


@_definition
def moe_sort(
    topk_ids: Tensor, num_experts: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    op = "moe_sort"
    ids = _ids(op, "topk_ids", topk_ids, topk_ids, ndim=2)
    return registry.call(
        op, ids, _check.integer(op, "num_experts", num_experts, 1), backend=backend
    )


def _align_fake(
    ids: Tensor, block: int, experts: int, expert_map: Any, pad: bool
) -> tuple[Tensor, ...]:
    slots = ids.numel()
    size = torch.sym_min(slots + experts * (block - 1), slots * block)
    blocks = (size + block - 1) // block
    new = functools.partial(ids.new_empty, dtype=torch.int32)
    return new(blocks * block if pad else size), new(blocks), new(1)


registry.define(
    "moe_align_block_size(Tensor topk_ids, int block_size, int num_experts, Tensor? expert_map, "
    "bool pad_sorted_ids) -> (Tensor, Tensor, Tensor)",
    room="moe",
    fake=_align_fake,
)


@_definition
def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    *,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "moe_align_block_size"
    ids = _ids(op, "topk_ids", topk_ids, topk_ids, ndim=2)
    return registry.call(
        op, ids, _check.integer(op, "block_size", block_size, 1),
        _check.integer(op, "num_experts", num_experts, 1),
        _optional_ids(op, "expert_map", expert_map, ids, ndim=1),
        _check.flag(op, "pad_sorted_ids", pad_sorted_ids), backend=backend,
    )  # fmt: skip


registry.define(
    "moe_permute(Tensor x, Tensor perm, int top_k) -> Tensor",
    room="moe",
    fake=lambda x, perm, top_k: x.new_empty(perm.shape[0], x.shape[1]),
)


@_definition
def moe_permute(x: Tensor, perm: Tensor, top_k: int, *, backend: str | None = None) -> Tensor:
    op = "moe_permute"
    _check.tensor(op, "x", x, ndim=2)
    places = _ids(op, "perm", perm, x, ndim=1)
    return registry.call(op, x, places, _check.integer(op, "top_k", top_k, 1), backend=backend)


registry.define(
    "moe_unpermute(Tensor y, Tensor inv_perm, Tensor? topk_weights) -> Tensor",
    room="moe",
    fake=lambda y, inv_perm, weights: y.new_empty(inv_perm.shape[0], y.shape[1]),
)


@_definition
def moe_unpermute(
    y: Tensor, inv_perm: Tensor, topk_weights: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    op = "moe_unpermute"
    _floats(op, "y", y, y, ndim=2)
    places = _ids(op, "inv_perm", inv_perm, y, ndim=2)
    weights = _optional_floats(op, "topk_weights", topk_weights, y, shape=tuple(places.shape))
    return registry.call(op, y, places, weights, backend=backend)


registry.define(
    f"grouped_mm(Tensor a, {_weights.schema('weight')}, Tensor? offs, Tensor? expert_ids, "
    "Tensor? bias, ScalarType out_dtype) -> Tensor",
    room="moe",
    fake=lambda a, *rest: a.new_empty(a.shape[0], rest[6][1], dtype=rest[-1]),
)


@_definition
def grouped_mm(
    a: Tensor,
    weight: Weight,
    offs: Tensor | None = None,
    *,
    expert_ids: Tensor | None = None,
    bias: Tensor | None = None,
    transposed: bool = False,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    op = "grouped_mm"
    _floats(op, "a", a, a, ndim=2)
    _check.flag(op, "transposed", transposed)
    w = _weights.check(op, "weight", weight, (None, None, a.shape[1]), a, transposed=transposed)
    experts, outputs = w.shape[0], w.shape[1]
    if (offs is None) == (expert_ids is None):
        got = "neither" if offs is None else "both"
        _check.fail(op, "offs", "exactly one of offs and expert_ids", got)
    ends = _optional_ids(op, "offs", offs, a, shape=(experts,))
    ids = _optional_ids(op, "expert_ids", expert_ids, a, shape=(a.shape[0],))
    bias = _optional_floats(op, "bias", bias, a, shape=(experts, outputs))
    if out_dtype is not None and out_dtype not in _FLOATS:
        _check.fail(op, "out_dtype", _check.names(_FLOATS), out_dtype, kind=TypeError)
    flat = _weights.flatten(op, "weight", w)
    return registry.call(op, a, *flat, ends, ids, bias, out_dtype or a.dtype, backend=backend)


registry.define(
    "moe_activation(Tensor x, str activation, float? alpha, float? limit, bool interleaved) "
    "-> Tensor",
    room="moe",
    fake=lambda x, activation, *rest: x.new_empty(
        *x.shape[:-1], x.shape[-1] // 2 if ACTIVATIONS[activation].gated else x.shape[-1]
    ),
)


def _activation(
    op: str, activation: Any, alpha: Any, limit: Any
) -> tuple[str, float | None, float | None]:
    """Check, and fill in the defaults of the activation."""
    act = ACTIVATIONS[_check.choice(op, "activation", activation, tuple(ACTIVATIONS))]
    alpha = act.alpha if alpha is None else _check.number(op, "alpha", alpha)
    limit = act.limit if limit is None else _check.number(op, "limit", limit)
    if limit is not None and not limit > 0:
        _check.fail(op, "limit", "a number > 0 (inf for no limit)", limit)
    return activation, alpha, limit


@_definition
def moe_activation(
    x: Tensor,
    activation: str = "silu",
    *,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    backend: str | None = None,
) -> Tensor:
    op = "moe_activation"
    _floats(op, "x", x, x)
    activation, alpha, limit = _activation(op, activation, alpha, limit)
    if x.ndim == 0 or (ACTIVATIONS[activation].gated and x.shape[-1] % 2):
        _check.fail(op, "x", "an even last dimension holding gate and up", _check.describe(x))
    interleaved = _check.flag(op, "interleaved", interleaved)
    return registry.call(op, x, activation, alpha, limit, interleaved, backend=backend)


registry.define(
    f"fused_experts(Tensor hidden_states, {_weights.schema('w13')}, {_weights.schema('w2')}, "
    "Tensor topk_weights, Tensor topk_ids, str activation, float? alpha, float? limit, "
    "bool interleaved, Tensor? w13_bias, Tensor? w2_bias, bool apply_router_weight_on_input, "
    "Tensor? expert_map, int num_identity_experts, Tensor? shared_w13, Tensor? shared_w2, "
    "Tensor? shared_gate) -> Tensor",
    room="moe",
    fake=lambda x, *rest: x.new_empty(x.shape),
)


@_definition
def fused_experts(
    hidden_states: Tensor,
    w13: Weight,
    w2: Weight,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    num_identity_experts: int = 0,
    shared_w13: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    op = "fused_experts"
    x = _floats(op, "hidden_states", hidden_states, hidden_states, ndim=2)
    tokens, hidden = x.shape
    activation, alpha, limit = _activation(op, activation, alpha, limit)
    _check.flag(op, "interleaved", interleaved)
    _check.flag(op, "transposed", transposed)
    first = _weights.check(op, "w13", w13, (None, None, hidden), x, transposed=transposed)
    experts, width = first.shape[0], first.shape[1]
    gated = ACTIVATIONS[activation].gated
    if gated and width % 2:
        _check.fail(op, "w13", "an even number of rows, gate and up", list(first.shape))
    inner = width // 2 if gated else width
    second = _weights.check(op, "w2", w2, (experts, hidden, inner), x, transposed=transposed)
    weights = _floats(op, "topk_weights", topk_weights, x, shape=(tokens, None))
    top_k = weights.shape[1]
    ids = _ids(op, "topk_ids", topk_ids, x, shape=(tokens, top_k))
    if _check.flag(op, "apply_router_weight_on_input", apply_router_weight_on_input) and top_k != 1:
        _check.fail(
            op,
            "apply_router_weight_on_input",
            "False unless top_k is 1",
            f"True with top_k {top_k}",
        )
    shared = (shared_w13, shared_w2)
    if shared_w13 is not None or shared_w2 is not None:
        _floats(op, "shared_w13", shared_w13, x, shape=(None, hidden))
        rows = shared_w13.shape[0]  # type: ignore[union-attr]
        if gated and rows % 2:
            _check.fail(op, "shared_w13", "an even number of rows, gate and up", rows)
        _floats(op, "shared_w2", shared_w2, x, shape=(hidden, rows // 2 if gated else rows))
    elif shared_gate is not None:
        _check.fail(op, "shared_gate", "None without shared_w13 and shared_w2", "a tensor")
    return registry.call(
        op, x, *_weights.flatten(op, "w13", first), *_weights.flatten(op, "w2", second),
        weights, ids, activation, alpha, limit, interleaved,
        _optional_floats(op, "w13_bias", w13_bias, x, shape=(experts, width)),
        _optional_floats(op, "w2_bias", w2_bias, x, shape=(experts, hidden)),
        apply_router_weight_on_input,
        _optional_ids(op, "expert_map", expert_map, x, ndim=1),
        _check.integer(op, "num_identity_experts", num_identity_experts, 0, 2**30),
        *shared, _optional_floats(op, "shared_gate", shared_gate, x, shape=(1, hidden)),
        backend=backend,
    )  # fmt: skip


@_definition
def fused_moe(
    hidden_states: Tensor,
    w13: Weight,
    w2: Weight,
    router_logits: Tensor,
    top_k: int,
    *,
    scoring_func: str = "softmax",
    softmax_after_topk: bool = False,
    renormalize: bool = False,
    renorm_eps: float = 1e-20,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2_sum",
    per_expert_scale: Tensor | None = None,
    num_fused_shared_experts: int = 0,
    shared_expert_weight: float = 1.0,
    token_mask: Tensor | None = None,
    topk_ids: Tensor | None = None,
    activation: str = "silu",
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    num_identity_experts: int = 0,
    shared_w13: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    op = "fused_moe"
    x = _floats(op, "hidden_states", hidden_states, hidden_states, ndim=2)
    if num_fused_shared_experts and num_identity_experts:
        _check.fail(
            op, "num_fused_shared_experts", "0 together with identity experts",
            num_fused_shared_experts, remedy="Pass the shared expert as shared_w13 and shared_w2",
        )  # fmt: skip
    logits = _floats(op, "router_logits", router_logits, x, shape=(x.shape[0], None))
    weights, ids = fused_topk(
        logits,
        top_k,
        scoring_func=scoring_func,
        softmax_after_topk=softmax_after_topk,
        renormalize=renormalize,
        renorm_eps=renorm_eps,
        routed_scaling_factor=routed_scaling_factor,
        e_score_correction_bias=e_score_correction_bias,
        num_expert_group=num_expert_group,
        topk_group=topk_group,
        group_score=group_score,
        per_expert_scale=per_expert_scale,
        num_fused_shared_experts=num_fused_shared_experts,
        shared_expert_weight=shared_expert_weight,
        token_mask=token_mask,
        topk_ids=topk_ids,
        backend=backend,
    )
    return fused_experts(
        x,
        w13,
        w2,
        weights,
        ids,
        activation=activation,
        alpha=alpha,
        limit=limit,
        interleaved=interleaved,
        transposed=transposed,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        apply_router_weight_on_input=apply_router_weight_on_input,
        expert_map=expert_map,
        num_identity_experts=num_identity_experts,
        shared_w13=shared_w13,
        shared_w2=shared_w2,
        shared_gate=shared_gate,
        backend=backend,
    )
