"""Modules over the ops: :class:`QuantLinear`, :class:`FusedMoE`, :class:`PagedAttention`.

Weights are packed for the backend that serves them when a module is first called, and from then on
kept packed only. ``state_dict`` always holds the plain form (codes and scales, as checkpoints store
them), so it means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from .cache import Step
from .formats import PackedWeight, QuantFormat, QuantTensor
from .ops.attention import paged_attention, reshape_and_cache
from .ops.matmul import pack_weight, quant_linear, unpack_weight
from .ops.moe import fused_experts, fused_topk
from .ops.quant import quantize

__all__ = ["FusedMoE", "PagedAttention", "QuantLinear"]

Plain = QuantTensor | Tensor


def _pieces(weight: Plain) -> dict[str, Tensor]:
    """The tensors of a plain weight by the suffix of their name in a state_dict."""
    if isinstance(weight, Tensor):
        return {"": weight}
    pieces = {"": weight.data, "_scale": weight.scale, "_global_scale": weight.global_scale}
    return {suffix: t for suffix, t in pieces.items() if t is not None}


class _PackedModule(nn.Module):
    """A module whose large weights are held packed, outside torch's parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self._plain: dict[str, Plain] = {}
        self._packed: dict[str, PackedWeight] = {}

    def _set_weight(self, name: str, weight: Tensor, format: QuantFormat | None) -> None:
        weight = weight.detach()
        self._plain[name] = weight if format is None else quantize(weight, format)

    def plain_weight(self, name: str) -> Plain:
        """A weight as it was before packing, bit for bit."""
        packed = self._packed.get(name)
        return self._plain[name] if packed is None else unpack_weight(packed)

    def packed_weight(self, name: str) -> PackedWeight:
        """A weight in its backend's layout; packed at the first call."""
        packed = self._packed.get(name)
        if packed is None:
            packed = self._packed[name] = pack_weight(self._plain[name])
            del self._plain[name]
        return packed

    def weight_nbytes(self) -> int:
        """Bytes of this module's weights as they are held now."""
        held = (*self._plain.values(), *self._packed.values(), *self.parameters(), *self.buffers())
        return sum(w.nbytes for w in held)

    def _names(self) -> tuple[str, ...]:
        return (*self._plain, *self._packed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name in self._names():
            plain = self.plain_weight(name)
            if isinstance(plain, Tensor):
                plain = fn(plain)
            else:  # codes and scales move, but never change their dtype
                plain = plain.to(fn(torch.empty(0, dtype=torch.uint8, device=plain.device)).device)
            self._packed.pop(name, None)
            self._plain[name] = plain
        return super()._apply(fn, recurse)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._names():
            for suffix, piece in _pieces(self.plain_weight(name)).items():
                destination[prefix + name + suffix] = piece

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: dict, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in self._names():
            plain = self.plain_weight(name)
            loaded = {}
            for suffix, piece in _pieces(plain).items():
                key = prefix + name + suffix
                if key in unexpected_keys:  # torch knows only parameters and buffers
                    unexpected_keys.remove(key)
                new = state_dict.get(key)
                if new is None:
                    missing_keys.append(key)
                elif new.shape != piece.shape or new.dtype != piece.dtype:
                    error_msgs.append(
                        f"{key}: expected {piece.dtype} {list(piece.shape)}, "
                        f"got {new.dtype} {list(new.shape)}"
                    )
                else:
                    loaded[suffix] = new.to(piece.device, copy=True)
            if loaded.keys() != _pieces(plain).keys():
                continue
            self._packed.pop(name, None)
            if isinstance(plain, Tensor):
                self._plain[name] = loaded[""]
            else:
                self._plain[name] = QuantTensor(
                    loaded[""], loaded["_scale"], loaded.get("_global_scale"), plain.format,
                    plain.shape,
                )  # fmt: skip


class QuantLinear(_PackedModule):
    """``x @ weight.T + bias`` with a packed weight, quantized to ``format`` or kept as it is
    (None).

    weight: [N, K] floating; bias: [N] or None.  activation: how x is quantized, see
    :func:`moesaic.quant_linear`.
    """

    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, format: QuantFormat | None = None,
        activation: str | QuantFormat | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format, self.activation = format, activation
        self._set_weight("weight", weight, format)
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: QuantFormat | None = None, **kwargs: Any
    ) -> QuantLinear:
        """The same layer with its weight quantized to ``format``."""
        return cls(linear.weight, linear.bias, format=format, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return quant_linear(x, self.packed_weight("weight"), self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, format={self.format}"


class FusedMoE(_PackedModule):
    """A mixture-of-experts layer: a linear router, top-k of E experts, their weighted sum.

    w13: [E, 2 I, H] gate rows then up rows; w2: [E, H, I]; both quantized to ``format`` or kept
        (None).
    router_weight: [E, H]; router_bias: [E] or None.
    unit_weights: every chosen expert counts with weight 1 instead of its routing weight.
    routing: further arguments of :func:`moesaic.fused_topk`, ``renormalize=True`` for example.
    activation: see :func:`moesaic.fused_experts`.
    """

    router_weight: Tensor
    router_bias: Tensor | None

    def __init__(
        self, w13: Tensor, w2: Tensor, router_weight: Tensor, router_bias: Tensor | None = None, *,
        top_k: int, format: QuantFormat | None = None, activation: str = "silu",
        unit_weights: bool = False, routing: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.top_k, self.format, self.activation = top_k, format, activation
        self.unit_weights, self.routing = unit_weights, dict(routing or {})
        self._set_weight("w13", w13, format)
        self._set_weight("w2", w2, format)
        self.register_buffer("router_weight", router_weight.detach())
        self.register_buffer("router_bias", None if router_bias is None else router_bias.detach())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = nn.functional.linear(x, self.router_weight, self.router_bias)
        topk_weights, topk_ids = fused_topk(logits, self.top_k, **self.routing)
        if self.unit_weights:
            topk_weights = torch.ones_like(topk_weights)
        out = fused_experts(
            x, self.packed_weight("w13"), self.packed_weight("w2"), topk_weights, topk_ids,
            activation=self.activation,
        )  # fmt: skip
        return out.view(hidden_states.shape)

    def extra_repr(self) -> str:
        experts, hidden = self.router_weight.shape
        return f"experts={experts}, top_k={self.top_k}, hidden={hidden}, format={self.format}"


class PagedAttention(nn.Module):
    """Write new keys and values into their pages, then attend over the pages.

    scale, causal, window, softcap, sinks: see :func:`moesaic.paged_attention`.
    """

    sinks: Tensor | None

    def __init__(
        self, *, scale: float | None = None, causal: bool = True,
        window: tuple[int, int] = (-1, -1), softcap: float = 0.0, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale, self.causal, self.window, self.softcap = scale, causal, window, softcap
        self.register_buffer("sinks", sinks)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, step: Step
    ) -> Tensor:
        """q [T, H, D], k [T, Hkv, D], v [T, Hkv, Dv] of the step's new tokens, and the layer's
        pages (``cache.k[i]``, ``cache.v[i]``): [T, H, Dv]."""
        reshape_and_cache(k, v, k_cache, v_cache, step.slot_mapping)
        out = paged_attention(
            q, k_cache, v_cache, step.block_table, step.seq_lens, cu_seqlens_q=step.cu_seqlens_q,
            scale=self.scale, causal=self.causal, window=self.window, softcap=self.softcap,
            sinks=self.sinks,
        )  # fmt: skip
        return cast(Tensor, out)  # no LSE was asked for
