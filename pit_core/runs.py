"""What a run reads and leaves behind: sets of parts out of folders, numbered output files, and its record."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


# parts


@dataclass(frozen=True)
class JobFiles:
    """One set of part files, in order, with what else the job reads, and its concepts' seeds."""

    parts: tuple[Path, ...]
    seeds: tuple[int, ...]
    reference: tuple[Path, ...] = ()
    init: Path | None = None

    def files(self) -> list[Path]:
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
    """Numbered names in an output folder: `003-contact-sheet.png`. No run writes over an earlier one."""

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
        self.number = self._next_number()
        made = not self.folder.exists()
        try:
            yield
        except BaseException:
            for path in self.written:
                path.unlink(missing_ok=True)
            if made and self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
            raise

    def add(self, name: str) -> Path:
        path = self.path(name)
        self.written.append(path)
        return path

    def _next_number(self) -> int:
        if not self.folder.is_dir():
            return 1
        taken = [int(m[1]) for entry in self.folder.iterdir() if (m := re.match(r"(\d{3,})-", entry.name))]
        return max(taken, default=0) + 1


def _check_writable(folder: Path) -> None:
    """Before the work rather than after it: the folder, or the nearest one above it that exists."""
    places = (folder.absolute(), *folder.absolute().parents)
    nearest = next((place for place in places if place.exists()), None)  # none on a drive that is not there
    if nearest is None or not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise PitError(f"'{folder}' cannot be written to; choose another folder with --out.")


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


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of a model folder: over the names and hashes of the files that matter."""
    if not path.is_dir():
        return sha256_of(path)
    names = sorted(
        file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix in MODEL_SUFFIXES
    )
    digest = hashlib.sha256()
    for name in names:
        digest.update(f"{name} {sha256_of(path / name)}\n".encode())
    return digest.hexdigest()


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
