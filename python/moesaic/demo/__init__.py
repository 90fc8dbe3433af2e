"""``moesaic demo``: a real language model on moesaic's ops.

SmolLM2-135M-Instruct becomes a mixture of experts made of its own neurons, answers a prompt, and
is compared with the stock model. Each module does one step: ``model`` converts and loads it,
``moeify`` makes the experts, ``runtime`` swaps the ops in, ``chat`` answers, ``compare`` measures,
``checks`` proves; ``main`` puts them in order.
"""

from __future__ import annotations

import argparse
import sys

from .errors import DemoError
from .flags import add_arguments, settings

__all__ = ["DemoError", "add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit status: 0, 1 if a check failed, 2 if it could not run."""
    try:
        chosen = settings(args)
        from .model import require_packages

        require_packages()
        from .main import main

        return main(chosen)
    except (DemoError, NotImplementedError) as error:
        print(error, file=sys.stderr)
        return 2
