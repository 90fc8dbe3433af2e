"""Which backend serves which contract case: the committed snapshot and the table in README.

    python -m moesaic.testing.support           compare with the committed files, exit 1 on a
    difference python -m moesaic.testing.support --write   rewrite them

The triton column needs TRITON_INTERPRET=1 on a machine without a GPU.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from .. import registry
from .case import Case
from .cases import all_cases

ROOT = Path(__file__).resolve().parents[3]
SNAPSHOT = ROOT / "tests/contract/support.json"
README = ROOT / "README.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"

Support = dict[str, dict[str, str]]


def snapshot(backend: str) -> dict[str, str]:
    """Case id -> "yes", or the reason why ``backend`` does not serve it; bench cases left out."""
    result = {}
    for case in all_cases():
        if "bench" not in case.tags:
            reason = why_not(backend, case)
            result[str(case)] = "yes" if reason is None else reason
    return result


def why_not(backend: str, case: Case) -> str | None:
    """None if ``backend`` serves the case, else the reason.  Weights are packed in its layout."""
    try:
        with registry.use_backend(backend):
            inputs = case.make_inputs(0)
    except NotImplementedError as error:  # it cannot even pack the weight
        return str(error).split(". ")[0]
    return registry.why_not(backend, case.op, **inputs)


def committed(backend: str) -> dict[str, str]:
    """The snapshot in the repository."""
    return json.loads(SNAPSHOT.read_text())[backend]


def table(support: Support) -> str:
    """A markdown table, op by backend: how many of the op's contract cases each backend serves."""
    counts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for backend, rows in support.items():
        for name, answer in rows.items():
            cell = counts[name.split("-", 1)[0]][backend]
            cell[0] += answer == "yes"
            cell[1] += 1
    rooms = {name: op.room for name, op in registry.ops().items()}
    order = {room: i for i, room in enumerate(registry.ROOMS)}
    lines = [
        "| room | op | reference | C++ (scalar, AVX2, AVX-512, NEON) | Triton |",
        "|---|---|---|---|---|",
    ]
    for op in sorted(counts, key=lambda n: (order.get(rooms.get(n, ""), 9), n)):
        if op not in rooms:
            lines.append(f"| composed | `{op}` | all | as its parts | as its parts |")
            continue
        cells = [_cell(*counts[op][b]) for b in ("cpu", "triton")]
        lines.append(f"| {rooms[op]} | `{op}` | all | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _cell(served: int, total: int) -> str:
    if served == 0:
        return "-"
    return "all" if served == total else f"{served} of {total} cases"


def readme_table() -> str:
    """The table that README holds now."""
    text = README.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def main() -> int:
    """Compare or rewrite; returns the exit status."""
    current = {backend: snapshot(backend) for backend in ("cpu", "triton")}
    if "--write" in sys.argv[1:]:
        SNAPSHOT.write_text(json.dumps(current, indent=1, sort_keys=True) + "\n")
        text = README.read_text()
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        README.write_text(f"{head}{BEGIN}\n{table(current)}\n{END}{tail}")
        return 0
    same = json.loads(SNAPSHOT.read_text()) == current and readme_table() == table(current)
    if not same:
        print("support.json or README's table is out of date: run `make docs`", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
