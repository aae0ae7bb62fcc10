"""Whether a run goes on with what it began with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import PitError
from ..files import write_text_atomic
from .loop import latest_checkpoint


def refuse_another_run(out: Path, now: Mapping[str, Any], *, write: bool) -> None:
    """Compare `now`, what this run depends on, with what the run in `out` began with; the first one writes it
    into run.json where `write` says so.

    A resumed run is only exact with the same data and model; the loop itself compares its own settings.
    Raises PitError that names what has changed, and for a run.json that is missing or damaged.
    """
    path = out / "run.json"
    if latest_checkpoint(out) is None:
        if write:
            write_text_atomic(path, json.dumps(now, indent=1))
        return
    was = _read(path)
    changed = [name for name, value in json.loads(json.dumps(now)).items() if was.get(name) != value]
    if changed:
        raise PitError(
            f"'{out}' was begun with other {', '.join(changed)} than these settings give; use the "
            "same again, or another folder for out."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PitError(f"'{path}' is missing or damaged; begin again in another folder.") from error
