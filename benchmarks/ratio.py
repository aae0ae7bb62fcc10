"""Timing one function against another so that the ratio means something on a busy machine."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable


def report(
    name: str,
    ours: Callable[[], object],
    reference: Callable[[], object],
    *,
    repeats: int = 7,
    bound: float | None = None,
) -> float:
    """Time both in turns, print a line for run.py, return median(ours) / median(reference).

    Taking turns lets both meet the same disturbances; each runs once before, unmeasured.
    """
    ours(), reference()
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for function, taken in zip((ours, reference), times, strict=True):
            started = time.perf_counter()
            function()
            taken.append(time.perf_counter() - started)
    return row(name, *map(statistics.median, times), bound=bound)


def row(name: str, ours_s: float, reference_s: float, *, bound: float | None = None) -> float:
    """Print a line for run.py of seconds measured otherwise, return ours_s / reference_s."""
    print(
        json.dumps({"name": name, "ours_s": ours_s, "reference_s": reference_s, "bound": bound}), flush=True
    )
    return ours_s / reference_s
