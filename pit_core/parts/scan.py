"""Looking through the pictures of a data set once, so that broken ones are known before training starts.

A picture that cannot be read, or shows nothing, is reported and left out; never is a white one put in its
place. A whole whose target is broken goes, and so does one that has lost all of its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..errors import PitError
from .augment import is_white
from .look import Skipped, look_at, report_skipped
from .manifest import Whole, path_below


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

    `folder` is the manifest's. What was found is kept in the file `memory`, also where the run breaks off, so
    that another one only looks at new and changed files. Raises PitError when no whole is left.
    """
    names = [name for whole in wholes for name in (whole.target, *whole.parts)]
    found = look_at(names, folder, memory, place=path_below, check=_refuse_white, quiet=quiet)
    broken = {name: entry["error"] for name, entry in found.items() if "error" in entry}
    skipped = [Skipped(name, reason) for name, reason in broken.items()]
    kept = [left for whole in wholes if (left := _without(whole, broken)) is not None]
    skipped += [
        Skipped(whole.target, f"None of the parts of '{whole.target}' can be used.")
        for whole in wholes
        if whole.target not in broken and whole.parts and set(whole.parts) <= broken.keys()
    ]
    if not kept:
        raise PitError(f"None of the {len(wholes)} wholes can be used; the first: {_first(skipped)}")
    report_skipped(skipped, len(found))
    hashes = {name: entry["sha256"] for name, entry in found.items() if "error" not in entry}
    return Scan(kept, skipped, hashes)


def _without(whole: Whole, broken: Mapping[str, str]) -> Whole | None:
    kept = [i for i, part in enumerate(whole.parts) if part not in broken]
    if whole.target in broken or (whole.parts and not kept):
        return None
    if len(kept) == len(whole.parts):
        return whole
    boxes = tuple(whole.boxes[i] for i in kept) if whole.boxes else ()
    return replace(whole, parts=tuple(whole.parts[i] for i in kept), boxes=boxes)


def _refuse_white(name: str, picture: Image.Image) -> None:
    if is_white(picture):
        raise PitError(f"'{name}' is white or transparent all over and shows nothing.")


def _first(skipped: Sequence[Skipped]) -> str:
    return skipped[0].reason if skipped else "there is none."
