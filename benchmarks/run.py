"""Run the benchmarks of this folder and print one table of ratios: how long ours takes against a reference.

    python benchmarks/run.py [--full] [NAME ...]

Every bench_NAME.py is a script that takes --quick. Lines that it prints by `ratio.report` (one JSON object
each) become rows of the table; its other lines are shown as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the benchmarks and print a table of ratios.")
    parser.add_argument("names", nargs="*", help="bench_NAME.py; all of them if none is given")
    parser.add_argument("--full", action="store_true", help="the long form, for figures to publish")
    options = parser.parse_args()
    scripts = _scripts(options.names)
    if not scripts:
        print("There are no benchmarks yet.")
        return 0
    rows, failed = [], []
    for script in scripts:
        started = time.monotonic()
        print(f"{script.stem} ...", flush=True)
        code, results = _run(script, options.full)
        print(f"{script.stem}: {time.monotonic() - started:.0f} s\n", flush=True)
        rows += results
        failed += [script.name] if code else []
    if rows:
        _print_table(rows)
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _scripts(names: list[str]) -> list[Path]:
    found = {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise SystemExit(
            f"There is no benchmark {', '.join(unknown)}; there are {', '.join(found) or 'none'}."
        )
    return [found[name] for name in names] or list(found.values())


def _run(script: Path, full: bool) -> tuple[int, list[dict]]:
    """The script's exit code and its rows; what else it prints is passed on."""
    command = [sys.executable, str(script)] + ([] if full else ["--quick"])
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout or ():
            if line.startswith("{"):
                rows.append(json.loads(line))
            else:
                print(line, end="", flush=True)
    return running.returncode, rows


def _print_table(rows: list[dict]) -> None:
    header = ("what", "ours", "reference", "ratio", "bound")
    cells = [(r["name"], _time(r["ours_s"]), _time(r["reference_s"]), _ratio(r), _bound(r)) for r in rows]
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    for row in [header, *cells]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _ratio(row: dict) -> str:
    return f"{row['ours_s'] / row['reference_s']:.2f}"


def _bound(row: dict) -> str:
    return f"<= {row['bound']:.2f}" if row.get("bound") is not None else ""


if __name__ == "__main__":
    raise SystemExit(main())
