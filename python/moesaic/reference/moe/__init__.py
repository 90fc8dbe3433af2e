"""Definitions of the moe room in plain PyTorch: routing, sorting and expert layers.

Names: T tokens, E experts, k (``top_k``) slots a token, S = T k slots, numbered ``t * k + j``, H
hidden size, I expert intermediate size.  An expert id is valid if it is in [0, E); a slot with any
other id (-1, or E as some libraries mark "elsewhere") takes no part: it contributes exactly 0,
whatever its weight or anything computed for it holds.
"""

from .experts import fused_experts, fused_moe
from .grouped import ACTIVATIONS, grouped_mm, moe_activation
from .routing import fused_topk
from .sorting import moe_align_block_size, moe_permute, moe_sort, moe_unpermute

__all__ = [
    "ACTIVATIONS",
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
