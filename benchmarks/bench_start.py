"""What the pack adds to ComfyUI's start: its import, against what ComfyUI imports itself.

COMFYUI_PATH=~/ComfyUI python benchmarks/bench_start.py [--quick]

Seconds of processor time, of one thread, each in a process of its own; bytecode is there already, as on every
start but the first. The garbage of the host's imports is collected before: a collection of all its objects
takes longer than our import, and may fall anywhere. Without a ComfyUI (the usual places are searched too) it
says so and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "nodes"
sys.path.insert(0, str(TESTS))

import ratio  # noqa: E402
import real_host  # noqa: E402

MOST = 0.15
"""Seconds that the pack may add."""

SCRIPT = """
import gc, json, sys, time
start = time.process_time()
tests = sys.argv[1]
sys.path[:0] = [tests, tests + "/..", "."]
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes
import comfy.sample, comfy.clip_vision, comfy_api.latest, comfy.supported_models
from PIL import Image, ImageDraw, ImageFilter
import numpy, yaml
import benches
gc.collect()
host = time.process_time()
benches.load_pack()
print(json.dumps([time.process_time() - host, host - start]))
"""


def start(comfyui: Path) -> tuple[float, float]:
    """Seconds of (the pack, the host itself)."""
    done = real_host.run(comfyui, "-c", SCRIPT, str(TESTS), timeout=300)
    if done.returncode:
        raise SystemExit(f"ComfyUI in {comfyui} did not start: {done.stderr[-500:]}")
    pack, host = json.loads(done.stdout.splitlines()[-1])
    return pack, host


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three starts instead of nine")
    options = parser.parse_args()
    places = real_host.folders()
    if not places:
        print("No ComfyUI was found, so its start was not measured; name its folder in COMFYUI_PATH.")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as bytecode:
        os.environ["PYTHONPYCACHEPREFIX"] = bytecode
        for place in places:
            start(place)  # writes the bytecode
            taken = [start(place) for _ in range(3 if options.quick else 9)]
            pack, host = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
            found = ratio.row(f"start of {place.name}", pack, host, bound=MOST / host)
            print(f"the pack adds {pack:.3f} s (at most {MOST} s) to {host:.1f} s: ratio {found:.3f}")


if __name__ == "__main__":
    main()
