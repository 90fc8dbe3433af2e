"""Run transformers models on moesaic's ops: paged attention and fused experts.

    from moesaic.integrations import transformers as moesaic_hf
    moesaic_hf.register()
    model.set_attn_implementation("moesaic")
    cache = moesaic_hf.PagedCache(model.config, max_tokens=4096)
    model.generate(**inputs, past_key_values=cache)

Public extension points of transformers only: ``AttentionInterface``, ``AttentionMaskInterface``,
``ExpertsInterface`` and a ``Cache`` of our own, whose layers hand their pages to the attention
function as an attribute of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import flash_attention_mask

from ..cache import PagedKVCache, Step
from ..ops.attention import paged_attention, reshape_and_cache

__all__ = ["NAME", "PagedCache", "PagedLayer", "attention", "register"]

NAME = "moesaic"


def register() -> None:
    """Make ``attn_implementation="moesaic"`` known to transformers.  May be called again."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


class PagedCache(Cache):
    """A transformers cache whose keys and values live in the pages of one :class:`PagedKVCache`.

    Args:
        config: of the model; gives layers, heads and head dimension.
        max_tokens: room, over all sequences of the batch; each takes whole pages.
        block_size: tokens per page.
        dtype, device: of the pages.

    The batch's sequences are named 0 .. B - 1 in ``pages``. Padding takes no room: padded columns
    are never written.
    """

    def __init__(
        self, config: PreTrainedConfig, *, max_tokens: int, block_size: int = 16,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        self.pages = PagedKVCache(
            num_layers=text.num_hidden_layers,
            num_blocks=-(-max_tokens // block_size),
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            block_size=block_size, dtype=dtype, device=device,
        )  # fmt: skip
        self.columns = 0
        self._step: _BatchStep | None = None
        super().__init__(layers=[PagedLayer(self, i) for i in range(text.num_hidden_layers)])

    def begin(self, batch: int, columns: int) -> None:
        """A forward pass adds ``columns`` tokens, padding included, to each of ``batch``
        sequences."""
        names = self.pages.sequences()
        if not names:
            for name in range(batch):
                self.pages.allocate(name)
        elif len(names) != batch:
            raise ValueError(
                f"PagedCache: keys: expected a batch of {len(names)} as before, got {batch}. "
                "Call reset() to start over."
            )
        self.columns += columns
        self._step = None

    def step(self, columns: int, mask: Tensor | None) -> _BatchStep:
        """Where this pass's tokens go; the first layer to ask decides for all."""
        if self._step is None:
            valid = None if mask is None else mask[:, -columns:].bool()
            self._step = _BatchStep.of(self.pages, columns, valid)
        return self._step

    def crop(self, max_length: int) -> None:
        """Keep the first ``max_length`` columns, or drop the last ``-max_length``."""
        columns = max_length if max_length >= 0 else max(self.columns + max_length, 0)
        dropped = self.columns - columns
        if dropped > 0:
            for name in self.pages.sequences():
                # Padding is on the left, so the dropped columns are tokens as far as there are any.
                self.pages.truncate(name, max(self.pages.length(name) - dropped, 0))
            self.columns = columns

    def reset(self) -> None:
        for name in self.pages.sequences():
            self.pages.free(name)
        self.columns = 0


class _BatchStep:
    """A :class:`Step` and which rows of the padded batch are its tokens (None: all, in order)."""

    def __init__(self, step: Step, rows: Tensor | None) -> None:
        self.step, self.rows = step, rows

    @classmethod
    def of(cls, pages: PagedKVCache, columns: int, valid: Tensor | None) -> _BatchStep:
        names: Sequence[Any] = pages.sequences()
        if valid is None or bool(valid.all()):
            return cls(pages.append(dict.fromkeys(names, columns)), None)
        counts = valid.sum(1).tolist()
        step = pages.append(dict(zip(names, counts, strict=True)))
        return cls(step, valid.flatten().nonzero()[:, 0])


class PagedLayer(CacheLayerMixin):
    """One layer of a :class:`PagedCache`."""

    is_sliding = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pages are there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note the layer on the new keys; the attention function writes and reads its pages."""
        if self.index == 0:
            self.cache.begin(key_states.shape[0], key_states.shape[2])
        key_states.paged = self  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """q, k, v [B, H, L, D] of the new columns, mask [B, all columns] bool or None:
        [B, L, H, D], zero where the mask is False."""
        batch, _, columns, _ = q.shape
        where = self.cache.step(columns, mask)
        q, k, v = (_rows(t, where.rows) for t in (q, k, v))
        k_cache, v_cache = self.cache.pages.k[self.index], self.cache.pages.v[self.index]
        step = where.step
        reshape_and_cache(k, v, k_cache, v_cache, step.slot_mapping)
        out = paged_attention(
            q, k_cache, v_cache, step.block_table, step.seq_lens, cu_seqlens_q=step.cu_seqlens_q,
            **kwargs,
        )  # fmt: skip
        return _columns(cast(Tensor, out), where.rows, batch, columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.cache.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        if self.index == 0:
            self.cache.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError(
            "PagedCache: reorder_cache: expected no beam search, got a reordering of beams. "
            "Use transformers' DynamicCache for beam search."
        )


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function over moesaic's paged attention.

    query [B, H, L, D], key [B, Hkv, S, D], value [B, Hkv, S, Dv]; attention_mask: bool [B, S],
    False for padding, or None. Returns ([B, L, H, Dv], None); padded rows are zero.
    """
    if dropout:
        raise NotImplementedError(
            f"moesaic attention: dropout: expected 0, got {dropout}. Call model.eval()."
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise NotImplementedError(
            "moesaic attention: attention_mask: expected a padding mask [batch, keys], got "
            f"{list(attention_mask.shape)}. Use attn_implementation='sdpa' for masks of one's own."
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = dict(
        scale=scaling,
        causal=causal,
        # transformers counts the token itself, the op counts keys to its left.
        window=(-1, -1) if sliding_window is None else (sliding_window - 1, -1),
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    layer = getattr(key, "paged", None)
    if layer is not None:
        return layer.attend(query, key, value, attention_mask, **options), None
    return _attend_dense(query, key, value, attention_mask, **options), None


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Attention over keys that are not in pages: each key becomes a page of one token, and a
    sequence's table lists its unpadded keys."""
    batch, _, columns, _ = q.shape
    keys = k.shape[2]
    pages = torch.arange(batch * keys, device=q.device, dtype=torch.int32).view(batch, keys)
    if mask is None:
        mask = torch.ones(batch, keys, dtype=torch.bool, device=q.device)
    mask = mask.bool()
    valid = mask[:, -columns:]
    counts = valid.sum(1, dtype=torch.int32)
    rows = None if bool(valid.all()) else valid.flatten().nonzero()[:, 0]
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)  # unpadded keys first, in order
    out = paged_attention(
        _rows(q, rows), _rows(k).unsqueeze(1), _rows(v).unsqueeze(1), pages.gather(1, order),
        mask.sum(1, dtype=torch.int32),
        cu_seqlens_q=torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)),
        **kwargs,
    )  # fmt: skip
    return _columns(cast(Tensor, out), rows, batch, columns)


def _rows(t: Tensor, rows: Tensor | None = None) -> Tensor:
    """[B, H, L, D] as token rows [B * L, H, D], or the ones listed."""
    flat = t.transpose(1, 2).flatten(0, 1)
    return flat if rows is None else flat[rows]


def _columns(out: Tensor, rows: Tensor | None, batch: int, columns: int) -> Tensor:
    """Token rows back as [B, L, H, D], zero where the batch is padded."""
    if rows is not None:
        full = out.new_zeros(batch * columns, *out.shape[1:])
        full[rows] = out
        out = full
    return out.unflatten(0, (batch, columns))
