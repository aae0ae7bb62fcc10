"""Looking through picture files once, so that broken ones are known before anything is trained on.

A picture that cannot be used is reported and left out, never replaced by another or by a blank one. What was
found is remembered in a file, so that the next look opens only new and changed pictures.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from operator import truediv
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import PitError
from ..files import sha256_of, write_text_atomic
from ..pictures import read_picture

SAVE_EVERY = 60.0  # seconds between two writings of the memory, at least
PAUSE = 20  # and at least so many times as long as a writing takes

Entry = dict[str, Any]
Check = Callable[[str, Image.Image], None]


@dataclass(frozen=True)
class Skipped:
    """A picture that is left out, and why."""

    file: str
    reason: str


def look_at(
    names: Iterable[str],
    folder: Path,
    memory: Path | None = None,
    *,
    place: Callable[[Path, str], Path] = truediv,
    check: Check | None = None,
    save_every: float = SAVE_EVERY,
    quiet: bool = False,
) -> dict[str, Entry]:
    """Decode each picture once: {"stamp", "sha256", "width", "height"} by its name, or {"stamp", "error"}.

    place: where a name lies below the folder. check: raises PitError for a picture that cannot be used.
    memory: the file that keeps what was found. It is also written every `save_every` seconds and when the
    look is broken off, so that another one goes on from there.
    """
    from tqdm.auto import tqdm

    names, found = list(dict.fromkeys(names)), dict[str, Entry]()
    kept = _Memory(memory, save_every)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        entries = pool.map(lambda name: _look(folder, name, place, check, kept.known.get(name)), names)
        try:
            bar = tqdm(entries, "looking at pictures", len(names), disable=quiet)
            for name, entry in zip(names, bar, strict=True):
                found[name] = entry
                kept.write_now_and_then(found)
        except BaseException:  # Ctrl-C, too
            kept.write(kept.known | found)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    kept.write(found)
    return found


def report_skipped(skipped: Sequence[Skipped], total: int, what: str = "pictures") -> None:
    """Warn of what is left out, if anything is; the first three reasons are named."""
    if skipped:
        shown = " ".join(item.reason for item in skipped[:3])
        more = f" (and {len(skipped) - 3} more)" if len(skipped) > 3 else ""
        warnings.warn(f"{len(skipped)} of {total} {what} are left out: {shown}{more}", stacklevel=2)


def save_skipped(path: Path, skipped: Sequence[Skipped]) -> None:
    """Write what is left out, one JSON line each."""
    write_text_atomic(path, "".join(json.dumps(asdict(item)) + "\n" for item in skipped))


def _look(
    folder: Path, name: str, place: Callable[[Path, str], Path], check: Check | None, known: Any
) -> Entry:
    stamp = None
    try:
        path = place(folder, name)
        if path.is_file():
            status = path.stat()
            stamp = [status.st_size, status.st_mtime_ns]
            if _tells(known, stamp):
                return dict(known)
        picture = read_picture(path)
        if check is not None:
            check(path.name, picture)
        width, height = picture.size
        return {"stamp": stamp, "sha256": sha256_of(path), "width": width, "height": height}
    except (PitError, OSError) as error:
        return {"stamp": stamp, "error": str(error)}


def _tells(known: Any, stamp: list[int]) -> bool:
    """Whether what is remembered is of this file: the same size and time."""
    if not isinstance(known, dict) or known.get("stamp") != stamp:
        return False
    return isinstance(known.get("error"), str) or {"sha256", "width", "height"} <= known.keys()


class _Memory:
    """What was found before, and the file that keeps it. What is not readable there is made anew."""

    def __init__(self, path: Path | None, save_every: float) -> None:
        self.path, self.save_every = path, save_every
        self.known = self._read()
        self._next = time.monotonic() + save_every

    def write_now_and_then(self, found: dict[str, Entry]) -> None:
        """Seldom enough that a look at millions of pictures spends its time on them."""
        if self.path is not None and (began := time.monotonic()) >= self._next:
            self.write(self.known | found)
            ended = time.monotonic()
            self._next = ended + max(self.save_every, PAUSE * (ended - began))

    def write(self, entries: dict[str, Entry]) -> None:
        if self.path is not None:
            write_text_atomic(self.path, json.dumps(entries))

    def _read(self) -> dict[str, Entry]:
        try:
            loaded = json.loads(self.path.read_text(encoding="utf-8")) if self.path else {}
        except (OSError, ValueError, RecursionError):
            return {}
        return loaded if isinstance(loaded, dict) else {}
