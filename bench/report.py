"""Write the benchmark tables of README from bench/results/cpu.json.

python bench/report.py           rewrite README
python bench/report.py --check   exit 1 if README does not hold these tables
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"


def tables(report: dict) -> str:
    """Markdown: the machine, its roofs, then one table with a row for each case and variant."""
    machine, roofs = report["machine"], report["roofs"]
    out = [
        f"Measured {machine['date']} on {machine['cpu']}, {machine['cores']} threads, torch "
        f"{machine['torch']}. Roofs measured in the same run: "
        + "; ".join(
            f"{isa} {r['read_bytes_per_s'] / 1e9:.1f} GB/s, {r['flops_per_s'] / 1e9:.0f} GFLOP/s"
            for isa, r in roofs.items()
        )
        + ".",
        "",
        "| case | variant | median ms | rate | of the roof |",
        "|---|---|---:|---:|---:|",
    ]
    for r in report["results"]:
        memory = r["bound"] == "memory"
        rate = r["bytes" if memory else "flops"] / r["median"] / 1e9
        share = r["roof_fraction"]
        out.append(
            f"| `{r['case']}` | {r['variant']} | {r['median'] * 1e3:.3f} | "
            f"{rate:.1f} {'GB/s' if memory else 'GFLOP/s'} | "
            f"{'' if share is None else f'{100 * share:.0f} %'} |"
        )
    out += ["", "Call overhead (smallest case, one thread), in microseconds: "]
    out[-1] += (
        ", ".join(f"`{op}` {us:.0f}" for op, us in sorted(report["overhead_us"].items())) + "."
    )
    return "\n".join(out)


def main() -> int:
    report = json.loads((ROOT / "bench/results/cpu.json").read_text())
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    new = f"{head}{BEGIN}\n{tables(report)}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
