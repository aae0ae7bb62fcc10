"""Looking through the pictures of a data set once, so that broken ones are known before training starts.

A picture that cannot be read, or shows nothing, is reported and left out; never is a white one put in its
place. A whole whose target is broken goes, and so does one that has lost all of its parts.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import PitError
from ..files import sha256_of, write_text_atomic
from ..pictures import read_picture
from .augment import is_white
from .manifest import Skipped, Whole, path_below


@dataclass(frozen=True)
class Scan:
    """The wholes that can be used, in order; what is left out; and the SHA-256 of each readable file."""

    wholes: list[Whole]
    skipped: list[Skipped]
    hashes: dict[str, str]


def readable(
    wholes: Sequence[Whole], folder: Path, memory: Path | None = None, *, quiet: bool = False
) -> tuple[list[Whole], list[Skipped]]:
    """The wholes with those pictures that can be read, and what is left out; see `scan`."""
    found = scan(wholes, folder, memory, quiet=quiet)
    return found.wholes, found.skipped


def scan(wholes: Sequence[Whole], folder: Path, memory: Path | None = None, *, quiet: bool = False) -> Scan:
    """The wholes with those pictures that can be read, in order; what is left out is also warned of.

    `folder` is the manifest's. What was found is kept in the file `memory`, so that another run only looks at
    new and changed files. Raises PitError when no whole is left.
    """
    from tqdm.auto import tqdm

    known = _read_memory(memory)
    names = list(dict.fromkeys(name for whole in wholes for name in (whole.target, *whole.parts)))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        entries = pool.map(lambda name: _look(folder, name, known.get(name)), names)
        bar = tqdm(entries, "looking at pictures", len(names), disable=quiet)
        found = dict(zip(names, bar, strict=True))
    if memory is not None:
        write_text_atomic(memory, json.dumps(found))
    broken = {name: entry["error"] for name, entry in found.items() if entry["error"]}
    skipped = [Skipped(name, reason) for name, reason in broken.items()]
    kept = [left for whole in wholes if (left := _without(whole, broken)) is not None]
    skipped += [
        Skipped(whole.target, f"None of the parts of '{whole.target}' can be used.")
        for whole in wholes
        if whole.target not in broken and whole.parts and set(whole.parts) <= broken.keys()
    ]
    if not kept:
        raise PitError(f"None of the {len(wholes)} wholes can be used; the first: {_first(skipped)}")
    if skipped:
        warnings.warn(_report(skipped, len(names)), stacklevel=2)
    hashes = {name: entry["sha256"] for name, entry in found.items() if not entry["error"]}
    return Scan(kept, skipped, hashes)


def _without(whole: Whole, broken: Mapping[str, str]) -> Whole | None:
    kept = [i for i, part in enumerate(whole.parts) if part not in broken]
    if whole.target in broken or (whole.parts and not kept):
        return None
    if len(kept) == len(whole.parts):
        return whole
    boxes = tuple(whole.boxes[i] for i in kept) if whole.boxes else ()
    return replace(whole, parts=tuple(whole.parts[i] for i in kept), boxes=boxes)


def _look(folder: Path, name: str, known: Any) -> dict[str, Any]:
    """{"stamp": the file's size and time, "sha256": its content's, "error": what is wrong with it or None}"""
    stamp, content = None, ""
    try:
        path = path_below(folder, name)
        if path.is_file():
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            if (
                isinstance(known, dict)
                and known.get("stamp") == stamp
                and {"error", "sha256"} <= known.keys()
            ):
                return known
        if is_white(read_picture(path)):
            raise PitError(f"'{path.name}' is white or transparent all over and shows nothing.")
        content = sha256_of(path)
    except (PitError, OSError) as error:
        return {"stamp": stamp, "sha256": content, "error": str(error)}
    return {"stamp": stamp, "sha256": content, "error": None}


def _read_memory(path: Path | None) -> dict[str, Any]:
    """What is not readable is made anew; it is only a memory."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _first(skipped: Sequence[Skipped]) -> str:
    return skipped[0].reason if skipped else "there is none."


def _report(skipped: Sequence[Skipped], total: int) -> str:
    shown = " ".join(item.reason for item in skipped[:3])
    more = f" (and {len(skipped) - 3} more)" if len(skipped) > 3 else ""
    return f"Left out of {total} pictures: {shown}{more}"
