"""What a run reads and leaves behind: sets of parts out of folders, numbered output files, and its record."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import PitError
from .files import existing_file, sha256_of, write_text_atomic
from .pictures import picture_files

FORMAT = "piece-it-together run"
VERSION = 1
MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".bin", ".ckpt", ".pt", ".pth", ".yaml")
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "pillow", "numpy")
LARGE = 16 << 20  # bytes: from here on a file's hash is remembered
REMEMBERED = 500  # files


# paths


def matched_paths(paths: Sequence[Path]) -> list[Path]:
    """`paths` with patterns such as `parts/*.png` replaced by what they match, sorted.

    Windows' shells hand patterns on as they are. A path that exists is never taken for a pattern, nor are the
    folders of a pattern that exist. Raises PitError for a pattern that nothing matches.
    """
    found: list[Path] = []
    for path in paths:
        if os.path.lexists(path) or not glob.has_magic(str(path)):
            found.append(path)
            continue
        matches = sorted(glob.glob(_pattern(path), recursive=True))
        if not matches:
            raise PitError(f"Nothing matches the pattern '{path}'; look at its folder and its spelling.")
        found += map(Path, matches)
    return found


def _pattern(path: Path) -> str:
    base = next((parent for parent in path.parents if parent.is_dir()), None)  # none on a missing drive
    return str(path) if base is None else os.path.join(glob.escape(str(base)), path.relative_to(base))


# parts


@dataclass(frozen=True)
class JobFiles:
    """One set of part files, in order, with what else the job reads, and its concepts' seeds.

    masks: of each of the `files`, or of none.
    """

    parts: tuple[Path, ...]
    seeds: tuple[int, ...]
    reference: tuple[Path, ...] = ()
    init: Path | None = None
    masks: tuple[Path, ...] = ()

    def files(self) -> list[Path]:
        """The pictures: parts, reference, what to start from."""
        return [*self.parts, *self.reference, *([self.init] if self.init else [])]


def check_part_files(paths: Sequence[Path]) -> None:
    """Raise PitError unless every path is a file; a folder gets the hint to --random."""
    for path in paths:
        if path.is_dir():
            raise PitError(
                f"'{path}' is a folder; name the picture files in it, or add --random 10 to try random sets."
            )
        existing_file(path)


def part_kinds(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Picture files by kind: a folder's subfolders are its kinds; a file outside any is a kind of its own.

    Raises PitError for paths that are missing and folders without pictures.
    """
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        if not path.is_dir():
            kinds[str(existing_file(path))] = [path]
            continue
        found = {str(file): [file] for file in picture_files(path)}
        for folder in sorted(sub for sub in path.iterdir() if sub.is_dir() and not sub.name.startswith(".")):
            if files := picture_files(folder):
                found[str(folder)] = files
        if not found:
            raise PitError(f"'{path}' holds no pictures, neither itself nor in its subfolders.")
        kinds |= found
    return kinds


def random_sets(paths: Sequence[Path], sets: int, seed: int, most: int) -> list[tuple[Path, ...]]:
    """`sets` random sets of 1 to `most` part files, at most one of a kind, the same for the same seed."""
    if not 1 <= sets <= 1000:
        raise PitError(f"Expected 1 to 1000 random sets, got {sets}.")
    kinds = part_kinds(paths)
    chosen = []
    for number in range(sets):
        chance = random.Random(f"{seed}/{number}")
        count = chance.randint(1, min(most, len(kinds)))
        chosen.append(tuple(chance.choice(kinds[kind]) for kind in chance.sample(sorted(kinds), count)))
    return chosen


# output


class RunFolder:
    """Numbered names in an output folder: `003-contact-sheet.png`. No run writes over another one.

    `number` is a guess until `writing` begins, which takes the number for this run alone.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.written: list[Path] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise PitError(f"'{self.folder}' is a file, but a folder for the pictures was expected.")
        _check_writable(self.folder)
        self.number = self._next_number()

    def path(self, name: str) -> Path:
        return self.folder / f"{self.number:03d}-{name}"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, `add` names files to write; when the block fails, those of this run are removed again."""
        made, self.written = not self.folder.exists(), []
        mark = self._reserve()
        try:
            yield
        except BaseException:
            for path in (*self.written, mark):
                path.unlink(missing_ok=True)
            if made and self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
            raise
        mark.unlink(missing_ok=True)

    def add(self, name: str) -> Path:
        path = self.path(name)
        self.written.append(path)
        return path

    def _reserve(self) -> Path:
        """Take the next free number, by a file that only one run can make and removes at its end."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while True:
                self.number = self._next_number()
                mark = self.path("unfinished")
                try:
                    mark.open("x").close()
                except FileExistsError:
                    continue
                if self._taken().count(self.number) == 1:
                    return mark
                mark.unlink()  # another run took the number and was done in between
        except OSError as error:
            raise PitError(
                f"'{self.folder}' cannot be written to; choose another folder with --out."
            ) from error

    def _next_number(self) -> int:
        return max(self._taken(), default=0) + 1

    def _taken(self) -> list[int]:
        """The number of each file that has one."""
        if not self.folder.is_dir():
            return []
        return [int(m[1]) for entry in self.folder.iterdir() if (m := re.match(r"(\d{3,})-", entry.name))]


def _check_writable(folder: Path) -> None:
    """Before the work rather than after it: the folder, or the nearest one above it that exists."""
    places = (folder.absolute(), *folder.absolute().parents)
    nearest = next((place for place in places if place.exists()), None)  # none on a drive that is not there
    if nearest is None or not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PitError(f"'{folder}' cannot be written to; choose another folder with --out.")


# hashes: a run names 10 GB of models in its record; what has not changed since is not read again


def fingerprint(path: Path, *, fresh: bool = False) -> str:
    """SHA-256 of a file, or of a model folder: over the names and hashes of the files that matter.

    Large files are read only once, until their size or time changes; `fresh` reads them in any case.
    """
    if not path.is_dir():
        return _remembered_hash(path, fresh)
    names = sorted(
        file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix in MODEL_SUFFIXES
    )
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {_remembered_hash(path / name, fresh)}\n".encode())
    return digest.hexdigest()


_hashes: dict[str, tuple[int, int, str]] = {}
"""What this process knows: real path -> size, time of change in ns, SHA-256."""


def hashes_file() -> Path:
    """Where the hashes of large files are kept between runs: in the system's folder for caches."""
    from platformdirs import user_cache_path

    return user_cache_path("piece-it-together", appauthor=False) / "hashes.json"


def _remembered_hash(path: Path, fresh: bool) -> str:
    path = existing_file(path)
    before = path.stat()
    if before.st_size < LARGE:
        return sha256_of(path)
    key, state = os.path.realpath(path), (before.st_size, before.st_mtime_ns)
    if not fresh:
        if key not in _hashes:
            _hashes.update(_stored_hashes() | _hashes)
        if _hashes.get(key, ())[:2] == state:
            return _hashes[key][2]
    digest = sha256_of(path)
    after = path.stat()
    # A file that changed just now may change again within one tick of the disk's clock.
    if state == (after.st_size, after.st_mtime_ns) and time.time_ns() - after.st_mtime_ns > 2_000_000_000:
        _hashes[key] = (*state, digest)
        _store_hash(key)
    return digest


def _stored_hashes() -> dict[str, tuple[int, int, str]]:
    """What the file holds; nothing where it is missing or damaged."""
    try:
        entries = json.loads(hashes_file().read_text("utf-8"))["files"]
        return {
            str(path): (int(size), int(changed), str(digest))
            for path, (size, changed, digest) in entries.items()
            if re.fullmatch("[0-9a-f]{64}", digest)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _store_hash(key: str) -> None:
    """Add one entry to the file, the newest last. A folder that cannot be written to only costs time."""
    entries = _stored_hashes()
    entries.pop(key, None)
    entries[key] = _hashes[key]
    newest = dict(list(entries.items())[-REMEMBERED:])
    with suppress(PitError, OSError, ValueError):
        write_text_atomic(hashes_file(), json.dumps({"files": newest}, indent=1))


# the record


@dataclass(frozen=True)
class Record:
    """Everything needed to repeat a run.

    model: name, and path and SHA-256 of each file. settings: every number and text. jobs: files with their
    SHA-256, seeds, names of the concepts.
    """

    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    jobs: Sequence[Mapping[str, Any]]
    command: Sequence[str] = ()
    pit: str = __version__
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""


def file_entry(path: Path, base: Path) -> dict[str, str]:
    """Path (relative to the record's folder where that is possible) and SHA-256."""
    return {"path": _portable(path, base), "sha256": fingerprint(path)}


def write_record(path: Path, record: Record) -> None:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "pit": record.pit,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "command": list(record.command),
        "model": dict(record.model),
        "settings": dict(record.settings),
        "jobs": [dict(job) for job in record.jobs],
    }
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_record(path: str | os.PathLike[str]) -> Record:
    """A run's record. Raises PitError for a file that is none, or of a newer version."""
    path = existing_file(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PitError(f"'{path.name}' is not readable as JSON; the record of a run was expected.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PitError(f"'{path.name}' is not the record of a run (NNN-record.json in its output folder).")
    if content.get("version") != VERSION:
        raise PitError(
            f"'{path.name}' has record version {content.get('version')!r}, but this release reads {VERSION}; "
            "update it."
        )
    kinds = {"model": dict, "settings": dict, "jobs": list, "command": list, "versions": dict, "pit": str}
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise PitError(f"'{path.name}' is damaged: its entry '{name}' is missing or of another kind.")
    return Record(**{name: content[name] for name in kinds}, created=str(content.get("created", "")))


def recorded_file(entry: Any, record: Path) -> Path:
    """The file or model folder that a record names; PitError when it is gone or has changed."""
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or "\0" in entry["path"]:
        raise PitError(f"'{record.name}' is damaged: a file's entry has no path.")
    path = Path(os.path.normpath(record.parent / entry["path"]))
    if not path.is_dir():
        existing_file(path)
    if fingerprint(path) != entry.get("sha256"):
        raise PitError(
            f"'{path}' has changed since the run was recorded; put the former file back to repeat it."
        )
    return path


def versions() -> dict[str, str]:
    """What decides a run's last bits: Python, packages, and how the processor adds numbers up."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads())}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def version_note(recorded: Mapping[str, str]) -> str | None:
    """A sentence for the user where a run is repeated with other versions than it was made with."""
    now = versions()
    names = [name for name in ("cpu", "threads", *PACKAGES) if recorded.get(name, now[name]) != now[name]]
    if not names:
        return None
    was, this = (", ".join(f"{name} {of[name]}" for name in names) for of in (recorded, now))
    return f"The run was recorded with {was}, but this is {this}; the pictures may differ slightly."


def _portable(path: Path, base: Path) -> str:
    try:
        return Path(os.path.relpath(path.absolute(), base.absolute())).as_posix()
    except ValueError:  # another drive on Windows
        return path.absolute().as_posix()
