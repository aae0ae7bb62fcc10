"""Folders of parts as others keep them, told by file names, as wholes for a manifest.

Two layouts of "Piece it Together" (arXiv 2503.10365), each folder a set of its own:

- released: targets `a_b.jpg`, their parts `a_b_0.jpg`, `a_b_1.jpg`, ...
- readme: targets `name.jpg`, their parts `name_0.jpg`, `name_1.jpg`, ...
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..errors import PitError
from ..pictures import picture_files
from .look import Skipped
from .manifest import Whole, path_below

Layout = Literal["auto", "released", "readme"]
NUMBERED = re.compile(r"(.+)_([0-9]+)")


def import_folder(
    folder: str | os.PathLike[str], layout: Layout = "auto"
) -> tuple[list[Whole], list[Skipped]]:
    """The wholes below `folder`, subfolders included, sorted by path; and the files that belong to none.

    Only names are looked at. A name that ends in a number is a part where the layout has it so and its target
    is in the same folder; a released part needs two words before its number. Every other name is a target,
    however many words it has. "auto" decides for each folder: readme where `name.jpg` and `name_0.jpg` are
    both there, else released. A set's name is its folder's path. A subfolder that cannot be read is left out
    as a whole.

    Raises PitError for an unknown layout, and for a folder that is missing, unreadable or holds no target.
    """
    folder = Path(folder)
    if layout not in ("auto", "released", "readme"):
        raise PitError(f"Expected the layout 'auto', 'released' or 'readme', got {layout!r}.")
    if not folder.is_dir():
        raise PitError(f"There is no folder '{folder}'; name the one that holds the pictures.")
    wholes: list[Whole] = []
    skipped: list[Skipped] = []
    closed: list[Skipped] = []
    for place in _folders(folder, closed):
        try:
            found, left = _import_set(folder, place, layout)
        except OSError as error:
            closed.append(_closed(folder, place, error))
            continue
        wholes += found
        skipped += left
    if not wholes and closed:
        raise PitError(closed[0].reason)
    if not wholes:
        raise PitError(f"'{folder}' holds no target picture, neither itself nor in its subfolders.")
    return wholes, skipped + closed


def _folders(folder: Path, closed: list[Skipped]) -> Iterator[Path]:
    """Those that can be listed; the others go into `closed`."""

    def skip(error: OSError) -> None:
        closed.append(_closed(folder, Path(error.filename), error))

    for place, names, _ in os.walk(folder, onerror=skip):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield Path(place)


def _closed(root: Path, place: Path, error: OSError) -> Skipped:
    reason = f"'{place}' cannot be read ({error.strerror or error}); change its permissions, or leave it out."
    return Skipped(place.relative_to(root).as_posix(), reason)


def _import_set(root: Path, place: Path, layout: Layout) -> tuple[list[Whole], list[Skipped]]:
    files, skipped = _usable(root, place)
    layout = _layout_of(files) if layout == "auto" else layout
    owners = {stem: _owner(stem, layout) for stem in files}
    parts: dict[str, list[str]] = {stem: [] for stem, owner in owners.items() if owner is None}
    for stem, owner in owners.items():
        if owner in parts:
            parts[owner].append(stem)
        elif owner is not None:
            reason = f"'{files[stem]}' is named as a part, but '{owner}' is no target in its folder."
            skipped.append(Skipped(files[stem], reason))
    name = root.resolve().name if place == root else place.relative_to(root).as_posix()
    wholes = [
        Whole(
            files[stem],
            tuple(files[part] for part in sorted(mine, key=_number)),
            set=name,
            provenance={"layout": layout},
        )
        for stem, mine in sorted(parts.items())
    ]
    return wholes, skipped


def _usable(root: Path, place: Path) -> tuple[dict[str, str], list[Skipped]]:
    """Stem -> path below the root, for the pictures directly in a folder; and those that cannot be named."""
    files: dict[str, str] = {}
    skipped = []
    for path in picture_files(place):
        name = path.relative_to(root).as_posix()
        try:
            path_below(root, name)
        except PitError as error:
            skipped.append(Skipped(name, str(error)))
            continue
        if path.stem in files:
            reason = f"'{name}' has the name of '{files[path.stem]}' but for its suffix; rename one."
            skipped.append(Skipped(name, reason))
        else:
            files[path.stem] = name
    return files, skipped


def _layout_of(files: dict[str, str]) -> Layout:
    """Where `name` and `name_0` are both there, the second can only be a part."""
    plain = (NUMBERED.fullmatch(stem) for stem in files)
    return "readme" if any(m and "_" not in m[1] and m[1] in files for m in plain) else "released"


def _owner(stem: str, layout: Layout) -> str | None:
    """The stem of the target whose part this is, or None for a target."""
    match = NUMBERED.fullmatch(stem)
    if match is None or (layout == "released" and "_" not in match[1]):
        return None
    return match[1]


def _number(stem: str) -> tuple[int, str]:
    return int(stem.rpartition("_")[2]), stem
