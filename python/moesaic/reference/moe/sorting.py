"""Sorting slots by expert, moving rows there and back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["moe_align_block_size", "moe_permute", "moe_sort", "moe_unpermute"]


def local_ids(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None = None) -> Tensor:
    """Ids as int64 of the same shape, through ``expert_map`` if given, everything invalid as -1.

    A global id is valid in [0, len(expert_map)), a local one in [0, num_experts).
    """
    ids = topk_ids.long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.shape[0])
        ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def moe_sort(topk_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stable counting sort of the slots by expert.

    topk_ids: [T, k] int.  Returns int32 tensors
      perm [S]: the slot at each sorted place, by expert and within an expert by slot; slots with an
        invalid id come last, in slot order;
      inv_perm [T, k]: the sorted place of each slot, -1 for invalid ids;
      offs [E]: where each expert's rows end, so that expert e has places offs[e - 1] to offs[e]
        (what grouped_mm takes); offs[-1] is the number of valid slots.
    """
    ids = local_ids(topk_ids, num_experts).flatten()
    order = torch.where(ids < 0, num_experts, ids)
    perm = torch.sort(order, stable=True).indices
    offs = torch.bincount(order, minlength=num_experts + 1)[:num_experts].cumsum(0)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.numel(), device=perm.device)
    inverse = torch.where(ids < 0, -1, inverse).view(topk_ids.shape)
    return perm.to(torch.int32), inverse.to(torch.int32), offs.to(torch.int32)


def moe_align_block_size(
    topk_ids: Tensor,
    block_size: int,
    num_experts: int,
    *,
    expert_map: Tensor | None = None,
    pad_sorted_ids: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots sorted by expert, each expert's run padded to whole blocks: vLLM's layout, but stable.

    topk_ids: [T, k] int.  num_experts: number of ids after ``expert_map`` (int [global experts],
    local id or -1).  Invalid slots are dropped.  Returns int32 tensors of sizes that depend on
    shapes only
      sorted_token_ids [P], P = S + num_experts (block_size - 1), at most S block_size; rounded up
        to whole blocks with ``pad_sorted_ids``: slots, experts ascending, slots ascending within an
        expert, padding = S;
      expert_ids [ceil(P / block_size)]: the expert of each block, -1 beyond the last;
      num_tokens_post_pad [1]: how many of sorted_token_ids are in use, a multiple of block_size.
    """
    ids = local_ids(topk_ids, num_experts, expert_map).flatten()
    slots, device = ids.numel(), ids.device
    size = min(slots + num_experts * (block_size - 1), slots * block_size)
    blocks = -(-size // block_size)
    if pad_sorted_ids:
        size = blocks * block_size

    counts = torch.bincount(ids[ids >= 0], minlength=num_experts)
    blocks_of = -(-counts // block_size)
    starts = (blocks_of.cumsum(0) - blocks_of) * block_size
    first = counts.cumsum(0) - counts
    perm = torch.sort(torch.where(ids < 0, num_experts, ids), stable=True).indices[
        : int(counts.sum())
    ]
    expert = ids[perm]
    places = starts[expert] + torch.arange(perm.numel(), device=device) - first[expert]

    sorted_token_ids = torch.full((size,), slots, dtype=torch.int32, device=device)
    sorted_token_ids[places] = perm.to(torch.int32)
    expert_ids = torch.full((blocks,), -1, dtype=torch.int32, device=device)
    used = torch.repeat_interleave(torch.arange(num_experts, device=device), blocks_of)
    expert_ids[: used.numel()] = used.to(torch.int32)
    total = (blocks_of.sum() * block_size).to(torch.int32).reshape(1)
    return sorted_token_ids, expert_ids, total


def moe_permute(x: Tensor, perm: Tensor, top_k: int) -> Tensor:
    """Rows of tokens in the order of slots: out[i] = x[perm[i] // top_k].

    x: [T, H], any dtype; perm: int [S].  A place outside [0, T top_k) gives a row of zeros.
    Returns [S, H] of x's dtype.  Differentiable in x.
    """
    slots = perm.long()
    valid = (slots >= 0) & (slots < x.shape[0] * top_k)
    if x.shape[0] == 0:
        return x.new_zeros(perm.shape[0], x.shape[1])
    rows = x[torch.where(valid, slots, 0) // top_k]
    return torch.where(valid[:, None], rows, torch.zeros((), dtype=x.dtype, device=x.device))


def moe_unpermute(y: Tensor, inv_perm: Tensor, topk_weights: Tensor | None = None) -> Tensor:
    """Sum over each token's slots: out[t] = sum_j topk_weights[t, j] y[inv_perm[t, j]].

    y: [S, H] floating; inv_perm: int [T, k]; topk_weights: [T, k] floating, 1 if None.  Summed in
    fp32 in slot order and rounded once.  A slot whose place is outside [0, S) contributes exactly
    0.  Returns [T, H] of y's dtype.  Differentiable in y and topk_weights.
    """
    wide = y.dtype == torch.float64 or (
        topk_weights is not None and topk_weights.dtype == torch.float64
    )
    work = torch.float64 if wide else torch.float32
    places = inv_perm.long()
    valid = (places >= 0) & (places < y.shape[0])
    out = y.new_zeros((places.shape[0], y.shape[1]), dtype=work)
    if y.shape[0] == 0:
        return out.to(y.dtype)
    for j in range(places.shape[1]):
        row = y[torch.where(valid[:, j], places[:, j], 0)].to(work)
        if topk_weights is not None:
            row = row * topk_weights[:, j, None].to(work)
        out = out + torch.where(valid[:, j, None], row, 0.0)
    return out.to(y.dtype)
