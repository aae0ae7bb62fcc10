"""The manifest of part data: which pictures are wholes, and which pictures show their parts.

JSON lines, one whole each; all paths are relative to the manifest's folder, with forward slashes:

    {"target": "elf/a.jpg", "parts": ["elf/a_0.png"], "boxes": [[10, 20, 90, 80]], "set": "elf",
     "provenance": {"prompt": "an elf", "seed": 7}}

Only `target` has to be there. A manifest may come from a stranger: no path in it leads out of its folder.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PitError
from ..files import existing_file, inside, write_text_atomic

Box = tuple[float, float, float, float]
KEYS = ("target", "parts", "boxes", "set", "provenance")
WIDEST = 1_000_000  # pixels: a box beyond it is a mistake


@dataclass(frozen=True)
class Whole:
    """One target picture and the pictures of its parts, by their paths below the manifest's folder.

    boxes: (left, top, right, bottom) of each part in the target's pixels, None where it is not known; empty
    when none is. set: the name that wholes of one kind share, for references. provenance: how it was made.
    """

    target: str
    parts: tuple[str, ...] = ()
    boxes: tuple[Box | None, ...] = ()
    set: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)


def read_manifest(path: str | os.PathLike[str]) -> list[Whole]:
    """The wholes of a manifest, in order; empty lines are passed over.

    Raises PitError, with the line's number, for what is no JSON object, keys that are unknown or stand there
    twice, values of another type, paths that lead out of the manifest's folder, a picture named twice in a
    line, and a target that an earlier line has; and for a file that is missing or holds no line.
    """
    path = existing_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PitError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    wholes = _wholes(data, path)
    if not wholes:
        raise PitError(f'\'{path.name}\' is empty; expected lines such as {{"target": "a.jpg"}}.')
    return wholes


def write_manifest(path: str | os.PathLike[str], wholes: Sequence[Whole]) -> None:
    """Write a manifest, complete or not at all. Raises PitError for wholes that could not be read again."""
    if not wholes:
        raise PitError(f"There is no whole to write into '{Path(path).name}'; a manifest needs one at least.")
    try:
        lines = [json.dumps(_plain(whole), ensure_ascii=False, allow_nan=False) for whole in wholes]
        data = "".join(f"{line}\n" for line in lines)
        _wholes(data.encode(), Path(path))
    except (TypeError, ValueError, RecursionError) as error:
        raise PitError(f"'{Path(path).name}' would hold what JSON cannot ({error}).") from error
    write_text_atomic(path, data)


def path_below(folder: Path, name: str) -> Path:
    """Where the picture `name` lies below `folder`. Raises PitError where it could lie elsewhere."""
    try:
        return inside(folder, name)
    except (ValueError, OSError) as error:  # half a surrogate pair, a circle of links
        raise PitError(f"{name[:100]!a} is not a usable name; take a plain one.") from error


def _plain(whole: Whole) -> dict[str, Any]:
    """What the line says; what is empty is left out."""
    return {key: value for key in KEYS if (value := getattr(whole, key))}


def _wholes(data: bytes, path: Path) -> list[Whole]:
    first_seen: dict[str, int] = {}
    wholes = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            whole = _whole(_parsed(line), path.parent)
            if whole.target in first_seen:
                raise PitError(f"has the target of line {first_seen[whole.target]} again; keep one of them.")
        except PitError as error:
            raise PitError(f"Line {number} of '{path.name}' {error}") from error
        first_seen[whole.target] = number
        wholes.append(whole)
    return wholes


# one line; the messages go on after "Line 3 of 'parts.jsonl' "


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise PitError(f"is not readable as JSON ({str(error)[:100]}).") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PitError(f"holds the key {key[:50]!a} twice; keep one.")
        found[key] = value
    return found


def _no_number(name: str) -> None:
    raise PitError(f"holds {name}, which is not a number in JSON.")


def _whole(value: Any, folder: Path) -> Whole:
    if not isinstance(value, dict):
        raise PitError(f'should be an object such as {{"target": "a.jpg"}}, got {_kind(value)}.')
    for key in value:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "put what is your own into 'provenance'."
            raise PitError(f"has the unknown key {key[:50]!a}; {hint}")
    target = _typed(value, "target", str, "a path")
    parts = tuple(_typed(value, "parts", list, "a list of paths", []))
    for name in (target, *parts):
        _check_path(name, folder)
    if len({target, *parts}) <= len(parts):
        raise PitError("names a picture twice; target and parts have to differ.")
    boxes = tuple(_box(box) for box in _typed(value, "boxes", list, "a list of boxes", []))
    if boxes and len(boxes) != len(parts):
        raise PitError(f"has {len(boxes)} boxes for {len(parts)} parts; give each its own, or null.")
    name = _typed(value, "set", str, "a name", "")
    return Whole(target, parts, boxes, name, _typed(value, "provenance", dict, "an object", {}))


def _typed(value: dict[str, Any], key: str, kind: type, words: str, default: Any = None) -> Any:
    found = value.get(key, default)
    if not isinstance(found, kind):
        what = _kind(found) if key in value else "nothing"
        raise PitError(f"should have {words} as '{key}', got {what}.")
    return found


def _check_path(name: Any, folder: Path) -> None:
    if not isinstance(name, str):
        raise PitError(f"should name pictures by their paths, got {_kind(name)}.")
    try:
        path_below(folder, name)
    except PitError as error:
        raise PitError(f"names a picture that may not be read: {error}") from error


def _box(value: Any) -> Box | None:
    if value is None:
        return None
    sides = value if isinstance(value, list) else []
    if len(sides) == 4 and all(
        isinstance(side, int | float) and not isinstance(side, bool) for side in sides
    ):
        left, top, right, bottom = sides
        if 0 <= left < right <= WIDEST and 0 <= top < bottom <= WIDEST:
            return left, top, right, bottom
    raise PitError(f"has the box {ascii(value)[:80]}; expected [left, top, right, bottom] in pixels.")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
