"""The demo's flags, and what they are allowed to say."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from .errors import DemoError

PROMPT = "Why is the sky blue?"
WEIGHTS = ("mxfp4", "fp8", "bf16", "fp32")
#: Intermediate neurons of each MLP of the model, to be shared among the experts.
NEURONS = 1536


@dataclass(frozen=True)
class Settings:
    """Validated flags."""

    prompt: str
    weights: str
    experts: int
    top_k: int
    max_new_tokens: int
    backend: str
    threads: int | None
    device: str
    seed: int
    chat_only: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags on the parser of ``moesaic demo``."""
    add = parser.add_argument
    # fmt: off
    add("--prompt", default=PROMPT, help="what to ask (default: %(default)s)")
    add("--weights", default="fp8", metavar="FORMAT",
        help=f"how experts and linears are held: {', '.join(WEIGHTS)} (default: %(default)s)")
    add("--experts", type=int, default=8, metavar="E",
        help=f"experts per layer, a divisor of {NEURONS} (default: %(default)s)")
    add("--top-k", type=int, metavar="K",
        help="experts per token (default: all of them, which is the dense model)")
    add("--max-new-tokens", type=int, default=96, metavar="N",
        help="length limit of the answer (default: %(default)s)")
    add("--backend", default="auto",
        help="who runs the ops: auto, cpu, triton or reference (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    add("--seed", type=int, default=0,
        help="of the clustering of neurons into experts (default: %(default)s)")
    add("--chat-only", action="store_true", help="answer the prompt and compare nothing")
    # fmt: on


def settings(args: argparse.Namespace) -> Settings:
    """Check the parsed flags; DemoError says which one is wrong and what it may be."""
    import torch

    from ..registry import BACKENDS

    _one_of("--weights", args.weights, WEIGHTS)
    _one_of("--backend", args.backend, ("auto", *BACKENDS))
    _one_of("--device", args.device, ("auto", "cpu", "cuda"))
    _expect(bool(args.prompt.strip()), "--prompt", "some text", repr(args.prompt))
    for flag, value in (("--max-new-tokens", args.max_new_tokens), ("--threads", args.threads)):
        _expect(value is None or value >= 1, flag, "at least 1", value)
    _expect(args.seed >= 0, "--seed", "at least 0", args.seed)
    fits = args.experts >= 1 and NEURONS % args.experts == 0
    _expect(fits, "--experts", f"a divisor of {NEURONS}", args.experts)
    top_k = args.experts if args.top_k is None else args.top_k
    _expect(1 <= top_k <= args.experts, "--top-k", f"1 to {args.experts} (--experts)", top_k)
    gpu = torch.cuda.is_available()
    device = ("cuda" if gpu else "cpu") if args.device == "auto" else args.device
    _expect(device == "cpu" or gpu, "--device", "cpu, as torch sees no GPU here", device)
    values = vars(args) | {"top_k": top_k, "device": device}
    return Settings(**{name: values[name] for name in Settings.__dataclass_fields__})


def _one_of(flag: str, value: str, options: tuple[str, ...]) -> None:
    _expect(value in options, flag, "one of " + ", ".join(options), value)


def _expect(ok: bool, flag: str, expected: str, got: object) -> None:
    if not ok:
        raise DemoError(f"demo: {flag}: expected {expected}, got {got}")
