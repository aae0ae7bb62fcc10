"""The loss curve of a run, drawn from its log."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from ..files import replacing


def read_log(path: Path, name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) pairs of a run's log.jsonl, in order.

    A step that was trained twice, after an interruption, counts with its last value; a half-written line at
    the end, which a power cut leaves, not at all.
    """
    found: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if name in entry:
            found[int(entry["step"])] = float(entry[name])
    return sorted(found.items())


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean of the last `window` values at every place; of fewer at the start."""
    starts = [max(0, i + 1 - window) for i in range(len(values))]
    return [sum(values[start : i + 1]) / (i + 1 - start) for i, start in enumerate(starts)]


def plot_losses(log_file: Path, target: Path) -> bool:
    """Write the loss curve as a PNG; False, with a warning, where there is nothing to draw with."""
    pairs = read_log(log_file)
    if not pairs:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warnings.warn(f"matplotlib is not installed, so {target.name} is not drawn.", stacklevel=2)
        return False
    steps, losses = zip(*pairs, strict=True)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="tight")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#b8c4d6", linewidth=0.8, label="loss")
    mean = smoothed(list(losses), max(1, len(losses) // 20))
    axes.plot(steps, mean, color="#1f4e8c", linewidth=1.6, label="mean of the last 5%")
    axes.set(xlabel="step", ylabel="loss", yscale="log" if min(losses) > 0 else "linear")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    with replacing(target) as temporary:
        figure.savefig(temporary, format="png")
    return True
