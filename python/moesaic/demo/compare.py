"""Stock transformers against moesaic, in one run: speed, memory, perplexity, agreement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from .progress import progress
from .runtime import CacheFactory, cache_nbytes, decode, prefill, weight_nbytes
from .types import Model

#: Decoding is timed in rounds that alternate between the contenders, so that a busy moment of the
#: machine meets all of them.
ROUNDS, ROUND_TOKENS = 5, 10
#: No contender gets much more than this to decode in, or half of it to prefill.
SECONDS = 6.0


@dataclass
class Contender:
    """One way to run the model, and what was measured of it."""

    name: str
    model: Model
    new_cache: CacheFactory
    #: entered around every use of the model: a backend, a number of experts
    setting: Callable[[], AbstractContextManager] = nullcontext
    decode_rates: list[float] = field(default_factory=list)
    prefill_rates: list[float] = field(default_factory=list)
    weight_bytes: int = 0
    cache_bytes: int = 0
    perplexity: float = 0.0
    greedy: Tensor = field(default_factory=lambda: torch.empty(0))


def compare(contenders: Sequence[Contender], prompt: Tensor, held_out: Tensor) -> None:
    """Measure every contender.

    prompt: [n] tokens, prefilled and then continued greedily for the speeds. held_out: [B, L]
    tokens for perplexity and for the greedy choice at each position.
    """
    with progress("measuring", len(contenders) * (2 + ROUNDS)) as step:
        for c in contenders:
            with c.setting():
                c.perplexity, c.greedy = score(c.model, held_out)
            c.weight_bytes = weight_nbytes(c.model)
            step()
        runs = []
        for c in contenders:
            runs.append(_prefill(c, prompt))
            step()
        for _ in range(ROUNDS):
            for c, tokens in zip(contenders, runs, strict=True):
                _decode_round(c, tokens)
                step()


def _prefill(c: Contender, prompt: Tensor) -> Iterator[int]:
    """Time the prompt a few times; returns what continues it."""
    begin = time.perf_counter()
    with c.setting():
        for _ in range(4):
            cache = c.new_cache()
            start = time.perf_counter()
            token = prefill(c.model, cache, prompt)
            c.prefill_rates.append(len(prompt) / (time.perf_counter() - start))
            if time.perf_counter() - begin > SECONDS / 2:
                break
        c.cache_bytes = cache_nbytes(cache)
        tokens = decode(c.model, cache, token)
        next(tokens)
    return tokens


def _decode_round(c: Contender, tokens: Iterator[int]) -> None:
    start, seconds, done = time.perf_counter(), 0.0, 0
    with c.setting():
        while done < ROUND_TOKENS and seconds < SECONDS / ROUNDS:
            next(tokens)
            done += 1
            seconds = time.perf_counter() - start
    c.decode_rates.append(done / seconds)


@torch.inference_mode()
def score(model: Model, tokens: Tensor) -> tuple[float, Tensor]:
    """(perplexity of each row's tokens after its first, greedy choice at each position [B, L])."""
    logits = model(tokens, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return loss.exp().item(), logits.argmax(-1)


def table(contenders: Sequence[Contender]) -> str:
    """The measurements as aligned text; greedy agreement is with the first contender."""
    head = ["", "decode tok/s", "prefill tok/s", "weights MB", "KV cache MB", "perplexity",
            "same greedy token"]  # fmt: skip
    first = contenders[0]
    rows = [head]
    for c in contenders:
        speed = median(c.decode_rates) / median(first.decode_rates)
        same = torch.eq(c.greedy, first.greedy).float().mean().item()
        rows.append([
            c.name,
            f"{median(c.decode_rates):.1f}" + ("" if c is first else f" ({speed:.2f}x)"),
            f"{median(c.prefill_rates):.0f}",
            f"{c.weight_bytes / 1e6:.0f}",
            f"{c.cache_bytes / 1e6:.2f}",
            f"{c.perplexity:.2f}",
            "-" if c is first else f"{same:.1%}",
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(
            x.rjust(w) if i else x.ljust(w)
            for i, (x, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
