"""A paged KV cache: fixed pages, reference counts, and the index tensors that the attention ops
read.

Each layer owns one tensor of key pages and one of value pages. A *sequence* is a list of pages and
a length; position p of it lives in page ``pages[p // block_size]``, slot ``p % block_size``. Pages
are shared between forks and copied when one of the sharers writes into them. This class does the
bookkeeping alone: keys and values are written by :func:`moesaic.reshape_and_cache` through the
:class:`Step` that :meth:`PagedKVCache.append` returns, the same for all layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CacheFull", "PagedKVCache", "Step"]


class CacheFull(RuntimeError):
    """Not enough free pages for a request; nothing was changed."""


@dataclass(frozen=True)
class Step:
    """The index tensors of one forward step over B sequences with T new tokens in all.

    slot_mapping: [T] int64, where each new token's key and value go, for ``reshape_and_cache``.
    block_table: [B, max_blocks] int32 page ids, -1 past a sequence's last page.
    seq_lens: [B] int32, lengths with the new tokens.
    cu_seqlens_q: [B + 1] int32, sequence b owns rows ``cu_seqlens_q[b]`` up to
        ``cu_seqlens_q[b + 1]``; None when every sequence has exactly one new token.
    """

    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None


@dataclass
class _Sequence:
    pages: list[int]
    length: int


class PagedKVCache:
    """Pages for ``num_layers`` layers and the sequences that live in them.

    Args:
        num_layers: layers, each with its own key tensor and value tensor.
        num_blocks: pages per layer.
        block_size: tokens per page.
        num_kv_heads, head_dim, head_dim_v: shape of a token's keys and values (``head_dim_v``
            defaults to ``head_dim``).
        dtype, device: of the pages.

    Attributes:
        k, v: per layer, [num_blocks, block_size, num_kv_heads, head_dim] ("NHD").
    """

    def __init__(
        self, *, num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int,
        head_dim_v: int | None = None, block_size: int = 16,
        dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        sizes = dict(
            num_layers=num_layers, num_blocks=num_blocks, num_kv_heads=num_kv_heads,
            head_dim=head_dim, head_dim_v=head_dim if head_dim_v is None else head_dim_v,
            block_size=block_size,
        )  # fmt: skip
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"PagedKVCache: {name}: expected an int, got {type(value).__name__}"
                )
            if value < 1:
                raise ValueError(f"PagedKVCache: {name}: expected an int >= 1, got {value}")
        self.num_blocks, self.block_size = num_blocks, block_size
        page = (num_blocks, block_size, num_kv_heads)
        # Zeros, not empty: what a page held before must not look like a NaN in a debugger.
        self.k = [
            torch.zeros(*page, head_dim, dtype=dtype, device=device) for _ in range(num_layers)
        ]
        self.v = [
            torch.zeros(*page, sizes["head_dim_v"], dtype=dtype, device=device)
            for _ in range(num_layers)
        ]
        self._sequences: dict[Hashable, _Sequence] = {}
        self._references = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))

    @property
    def device(self) -> torch.device:
        return self.k[0].device

    @property
    def num_free_blocks(self) -> int:
        """Pages that no sequence uses."""
        return len(self._free)

    @property
    def block_nbytes(self) -> int:
        """Bytes of one page over all layers, keys and values."""
        return sum(pages[0].nbytes for pages in (*self.k, *self.v))

    @property
    def nbytes(self) -> int:
        """Bytes of all pages, used or not."""
        return self.block_nbytes * self.num_blocks

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages that sequences use; a shared page counts once."""
        return self.block_nbytes * (self.num_blocks - self.num_free_blocks)

    def sequences(self) -> tuple[Hashable, ...]:
        """The sequences alive, oldest first."""
        return tuple(self._sequences)

    def length(self, sequence: Hashable) -> int:
        """Tokens of a sequence."""
        return self._find("length", sequence).length

    def pages(self, sequence: Hashable) -> tuple[int, ...]:
        """Page ids of a sequence, in order of position."""
        return tuple(self._find("pages", sequence).pages)

    def allocate(self, sequence: Hashable) -> None:
        """Start an empty sequence under a new name."""
        if sequence in self._sequences:
            raise ValueError(
                f"PagedKVCache.allocate: sequence: expected a new name, got {sequence!r}"
            )
        self._sequences[sequence] = _Sequence([], 0)

    def append(self, counts: Mapping[Hashable, int]) -> Step:
        """Make room for ``counts[sequence]`` (>= 0) new tokens of each sequence.

        All or nothing: raises :class:`CacheFull` and changes nothing if the pages do not suffice.
        A last page that is shared with a fork is copied first. Rows of the step are in the order
        of ``counts``.
        """
        states = [self._find("append", name) for name in counts]
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(
                    f"PagedKVCache.append: counts: expected ints >= 0, got {count!r} for {name!r}"
                )
        needed = self._pages_needed(states, counts.values())
        if needed > len(self._free):
            raise CacheFull(
                f"PagedKVCache.append: counts: expected at most {len(self._free)} new pages of "
                f"{self.block_size} tokens, got {needed}. Free sequences, or make the cache larger."
            )
        slots: list[int] = []
        for state, count in zip(states, counts.values(), strict=True):
            slots += self._grow(state, count)
        return self._step(states, list(counts.values()), slots)

    def fork(self, parent: Hashable, child: Hashable) -> None:
        """Start ``child`` with the tokens of ``parent``; no token is copied until one of them
        writes."""
        state = self._find("fork", parent)
        self.allocate(child)
        for page in state.pages:
            self._references[page] += 1
        self._sequences[child] = _Sequence(list(state.pages), state.length)

    def truncate(self, sequence: Hashable, length: int) -> None:
        """Keep the first ``length`` tokens of a sequence, 0 <= length <= its length."""
        state = self._find("truncate", sequence)
        if not 0 <= length <= state.length:
            raise ValueError(
                f"PagedKVCache.truncate: length: expected 0 to {state.length}, got {length}"
            )
        keep = -(-length // self.block_size)
        self._release(state.pages[keep:])
        del state.pages[keep:]
        state.length = length

    def free(self, sequence: Hashable) -> None:
        """End a sequence; pages that no other one uses become free."""
        self._release(self._find("free", sequence).pages)
        del self._sequences[sequence]

    def block_table(self, sequences: Iterable[Hashable]) -> Tensor:
        """[B, max_blocks] int32 page ids, -1 past a sequence's last page (at least one column)."""
        return self._block_table([self._find("block_table", name) for name in sequences])

    def seq_lens(self, sequences: Iterable[Hashable]) -> Tensor:
        """[B] int32 lengths."""
        return self._ints([self.length(name) for name in sequences])

    def slot_mapping(self, sequence: Hashable, start: int = 0, end: int | None = None) -> Tensor:
        """[end - start] int64 slots of positions start to end (default: to the last token)."""
        state = self._find("slot_mapping", sequence)
        end = state.length if end is None else end
        if not 0 <= start <= end <= state.length:
            raise ValueError(
                "PagedKVCache.slot_mapping: start, end: expected 0 <= start <= end <= "
                f"{state.length}, got {start} and {end}"
            )
        return self._ints(self._slots(state, start, end), torch.int64)

    def check(self) -> None:
        """Verify every invariant of the bookkeeping; RuntimeError names the one that is broken."""
        held = Counter(page for s in self._sequences.values() for page in s.pages)
        for name, s in self._sequences.items():
            if len(s.pages) != -(-s.length // self.block_size):
                raise RuntimeError(f"{name!r}: {len(s.pages)} pages for {s.length} tokens")
            if len(set(s.pages)) != len(s.pages):
                raise RuntimeError(f"{name!r}: a page twice in {s.pages}")
        for page, count in enumerate(self._references):
            if count != held[page]:
                raise RuntimeError(f"page {page}: counted {count}, held by {held[page]} sequences")
        if sorted(self._free) != [p for p in range(self.num_blocks) if not held[p]]:
            raise RuntimeError("the free list is not the set of pages that nobody holds")

    def _find(self, method: str, sequence: Hashable) -> _Sequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            known = ", ".join(map(repr, self._sequences)) or "none"
            raise ValueError(
                f"PagedKVCache.{method}: sequence: expected one of the sequences alive ({known}), "
                f"got {sequence!r}"
            ) from None

    def _pages_needed(self, states: Iterable[_Sequence], counts: Iterable[int]) -> int:
        """New pages plus copies of shared last pages.  Of several sharers that all write, the last
        one keeps the page."""
        needed, sharers = 0, dict[int, int]()
        for state, count in zip(states, counts, strict=True):
            needed += -(-(state.length + count) // self.block_size) - len(state.pages)
            if count and state.length % self.block_size:
                tail = state.pages[-1]
                left = sharers.setdefault(tail, self._references[tail])
                if left > 1:
                    sharers[tail] = left - 1
                    needed += 1
        return needed

    def _grow(self, state: _Sequence, count: int) -> list[int]:
        """Give a sequence ``count`` more positions; returns their slots."""
        start = state.length
        if count and start % self.block_size and self._references[state.pages[-1]] > 1:
            shared = state.pages[-1]
            state.pages[-1] = self._take()
            for pages in (*self.k, *self.v):
                pages[state.pages[-1]] = pages[shared]
            self._release([shared])
        state.length += count
        while len(state.pages) * self.block_size < state.length:
            state.pages.append(self._take())
        return self._slots(state, start, state.length)

    def _slots(self, state: _Sequence, start: int, end: int) -> list[int]:
        size = self.block_size
        return [state.pages[p // size] * size + p % size for p in range(start, end)]

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _release(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def _step(self, states: list[_Sequence], counts: list[int], slots: list[int]) -> Step:
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        return Step(
            slot_mapping=self._ints(slots, torch.int64),
            block_table=self._block_table(states),
            seq_lens=self._ints([s.length for s in states]),
            cu_seqlens_q=None if all(c == 1 for c in counts) else self._ints(starts),
        )

    def _block_table(self, states: list[_Sequence]) -> Tensor:
        width = max((len(s.pages) for s in states), default=0) or 1
        rows = [s.pages + [-1] * (width - len(s.pages)) for s in states]
        return self._ints(rows).reshape(len(rows), width)

    def _ints(self, values: list, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)
