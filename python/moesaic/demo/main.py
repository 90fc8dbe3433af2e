"""The steps of the demo in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from transformers import DynamicCache

import moesaic

from .chat import answer
from .checks import matches_dense, who_runs
from .compare import Contender, compare, table
from .flags import Settings
from .model import load_model, load_tokenizer, model_folder
from .moeify import expert_splits
from .runtime import paged_cache, set_top_k, swap_in
from .text import windows
from .types import Model

_HELD_OUT = (4, 256)
_CACHE_TOKENS = 512


def main(s: Settings) -> int:
    """Convert, split, answer, check, compare; returns 0, or 1 if the check failed."""
    if s.threads:
        torch.set_num_threads(s.threads)
    folder = model_folder()
    tokenizer = load_tokenizer(folder)
    dense = load_model(folder, torch.float32)
    splits = expert_splits(folder, tokenizer, dense, s.experts, s.seed)
    # CPUs multiply fp32 activations with packed weights; GPUs have matrix units for bf16.
    dtype = torch.bfloat16 if s.device == "cuda" and s.weights != "fp32" else torch.float32
    model = swap_in(dense.to(dtype), splits, s.weights, s.top_k).to(s.device)
    print(
        f"SmolLM2-135M-Instruct with {s.experts} experts a layer, {s.top_k} per token, {s.weights} "
        f"weights, on {s.device}, {torch.get_num_threads()} CPU threads"
    )
    backend = _backend(s.backend)
    with backend():
        answer(model, tokenizer, s.weights, s.prompt, s.max_new_tokens)
        ran = who_runs(model, s.weights)
    if s.chat_only:
        _print_ops(ran)
        return 0

    held_out = windows(tokenizer, *_HELD_OUT, held_out=True).to(s.device)
    with backend():
        ours, stock = matches_dense(folder, splits, held_out[0, :64])
    # A copy with plain weights again: each backend packs its own.
    reference = copy.deepcopy(model).to(s.device)

    def moesaic_row(
        name: str, model: Model, top_k: int, backend: Callable[[], AbstractContextManager]
    ) -> Contender:
        @contextmanager
        def setting() -> Iterator[None]:
            set_top_k(model, top_k)
            with backend():
                yield

        return Contender(
            f"moesaic {name}, {s.weights}, k={top_k}", model,
            lambda: paged_cache(model, s.weights, _CACHE_TOKENS), setting,
        )  # fmt: skip

    # Beside the choice: all experts, or what leaving a quarter of them out gains and costs.
    other = s.experts if s.top_k < s.experts else max(1, s.experts * 3 // 4)
    kernels = dict(ran)["fused_experts"]
    contenders = [
        Contender(
            "transformers, bf16, dense", load_model(folder, torch.bfloat16).to(s.device),
            lambda: DynamicCache(),
        ),
        moesaic_row("reference", reference, s.top_k, _backend("reference")),
        moesaic_row(kernels, model, s.top_k, backend),
        moesaic_row(kernels, model, other, backend),
    ]  # fmt: skip
    compare(contenders, held_out[0], held_out)
    print(table(contenders))
    print(
        f"\nPerplexity and greedy choices: {held_out.numel()} held-out tokens of Python's language "
        f"reference.\nSpeeds and KV cache: after a prompt of {held_out.shape[1]} tokens; speeds "
        "are medians of rounds in turn.\n"
    )
    exact = ours <= 2 * stock
    print(
        f"All {s.experts} experts with fp32 weights: logits within {ours:.1e} of the dense model's "
        f"in fp64, transformers in fp32 within {stock:.1e}: "
        + ("equal to fp32 rounding." if exact else "NOT equal to fp32 rounding.")
    )
    _print_ops(ran)
    return 0 if exact else 1


def _backend(name: str) -> Callable[[], AbstractContextManager]:
    """What to enter around uses of a model."""
    return nullcontext if name == "auto" else lambda: moesaic.use_backend(name)


def _print_ops(ran: list[tuple[str, str]]) -> None:
    print("Ops ran on: " + ", ".join(f"{op}: {where}" for op, where in ran))
