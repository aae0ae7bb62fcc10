"""`pit data generate`: pictures of wholes and of their parts, out of nothing but a seed, into a folder.

What draws and what finds parts is handed in (a `Source`); here is what is the same for all: every picture is
a function of seed and index, files are whole or absent, and a run that was stopped goes on where it was.

    data/000/000003.png      a whole, then its parts: 000003_0.png, 000003_1.png, ...
    data/parts.jsonl         the manifest, in the order of the pictures
    data/generate.json       what the folder was begun with; a run with anything else is refused
    data/generate.jsonl      what became of each picture: the manifest's line, or why it was left out
    data/contact-sheet.png   some of the wholes and their parts
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ..errors import PitError
from ..files import write_text_atomic
from ..pictures import read_picture, save_png
from .augment import Augment
from .dataset import PartData
from .manifest import Whole, write_manifest
from .masks import Piece
from .sheet import choose_rows, part_sheet

MANIFEST, SETTINGS, JOURNAL, SHEET = "parts.jsonl", "generate.json", "generate.jsonl", "contact-sheet.png"
FORMAT = "piece-it-together generated parts 1"


@dataclass(frozen=True)
class Order:
    """One picture to draw. name: what its masks are called by; set: what the manifest says."""

    index: int
    prompt: str
    seed: int
    set: str
    name: str
    negative: str = ""

    @property
    def stem(self) -> str:
        """Its place below the output folder, without a suffix; a thousand pictures to a folder."""
        return f"{self.index // 1000:03d}/{self.index:06d}"


@dataclass(frozen=True)
class Rejected:
    """In place of a picture or of its parts: why it is left out for good."""

    reason: str


class Source(Protocol):
    """What pictures come from.

    batch: how many are drawn at a time. entry: everything the pictures depend on, as JSON can hold it.
    """

    batch: int
    entry: Mapping[str, Any]

    def order(self, index: int) -> Order:
        """What to draw: a function of the index and of `entry`."""

    def draw(self, orders: Sequence[Order]) -> Sequence[Image.Image | Rejected]:
        """The wholes."""

    def find(self, image: Image.Image, order: Order) -> Sequence[Piece] | Rejected | None:
        """Its parts; None where that cannot be said yet (masks are still to be made)."""


@dataclass(frozen=True)
class Generated:
    """What is in the folder now, and how many pictures were drawn by this run."""

    folder: Path
    wholes: int
    parts: int
    rejected: int
    waiting: int
    drawn: int

    def __str__(self) -> str:
        left_out = f", {self.rejected} left out (see {JOURNAL})" if self.rejected else ""
        waiting = f", {self.waiting} wait for masks" if self.waiting else ""
        counts = f"{self.wholes} wholes with {self.parts} parts{left_out}{waiting}"
        return f"{counts}; {self.drawn} pictures drawn now"


def generate(source: Source, count: int, out: str | os.PathLike[str], *, quiet: bool = False) -> Generated:
    """Make the pictures 0 to count - 1 of a source, and their parts, in `out`; go on with what is missing.

    The files depend on the source alone: not on where a run stopped, nor on `count`. Batches are drawn whole,
    because a picture's last bits depend on its neighbours there. When the run is stopped or fails, the
    manifest says what is complete.

    Raises PitError for a folder that was begun with other settings or holds something else, for pictures
    without a usable part among them, and as the source and the writing do.
    """
    from tqdm.auto import tqdm

    if count < 1:
        raise PitError(f"Expected at least 1 picture to generate, got {count}.")
    folder = Path(out)
    _open(folder, source)
    journal = Journal(folder)
    drawn = waiting = 0
    bar = tqdm(total=count, initial=journal.below(count), desc="generating", unit="picture", disable=quiet)
    try:
        with bar:
            for start in range(0, count, source.batch):
                todo = [i for i in range(start, min(start + source.batch, count)) if i not in journal.lines]
                orders = {i: source.order(i) for i in range(start, start + source.batch)} if todo else {}
                drawn += _draw(source, orders, todo, folder, journal)
                for index in todo:
                    done = index in journal.lines or _cut(source, orders[index], folder, journal)
                    waiting += not done
                    bar.update()
                journal.write_manifest_now_and_then()
    finally:
        journal.write_manifest()
    wholes = journal.wholes()
    if not wholes and not waiting:
        raise PitError(f"None of the {count} pictures can be used; the first: {journal.first_reason()}")
    if wholes:
        shown = choose_rows(len(wholes), 8)
        save_png(part_sheet(PartData(wholes, folder, Augment()), shown), folder / SHEET)
    parts = sum(len(whole.parts) for whole in wholes)
    return Generated(folder, len(wholes), parts, len(journal.lines) - len(wholes), waiting, drawn)


def _draw(
    source: Source, orders: Mapping[int, Order], todo: Sequence[int], folder: Path, journal: Journal
) -> int:
    """Draw a batch if one of its pictures is missing, and write the missing ones: how many."""
    missing = [index for index in todo if not _target(folder, orders[index]).is_file()]
    if not missing:
        return 0
    made = dict(zip(orders, source.draw(list(orders.values())), strict=True))
    for index in missing:
        image = made[index]
        if isinstance(image, Rejected):
            journal.add(index, {"rejected": image.reason})
        else:
            save_png(image, _target(folder, orders[index]))
    return len(missing)


def _cut(source: Source, order: Order, folder: Path, journal: Journal) -> bool:
    """Find and write the parts of one picture: whether its fate is known."""
    found = source.find(read_picture(_target(folder, order)), order)
    if found is None:
        return False
    if isinstance(found, Rejected):
        journal.add(order.index, {"rejected": found.reason, "prompt": order.prompt})
        return True
    names = [f"{order.stem}_{number}.png" for number in range(len(found))]
    for name, piece in zip(names, found, strict=True):
        save_png(piece.image, folder / name)
    provenance = {"prompt": order.prompt, "seed": order.seed, "kinds": [piece.kind for piece in found]}
    boxes = tuple(piece.box for piece in found)
    known = boxes if any(box is not None for box in boxes) else ()
    whole = Whole(f"{order.stem}.png", tuple(names), known, order.set, provenance)
    journal.add(order.index, {"whole": asdict(whole)})
    return True


def _target(folder: Path, order: Order) -> Path:
    return folder / f"{order.stem}.png"


# what the folder remembers


def _open(folder: Path, source: Source) -> None:
    """Begin the folder, or see that it was begun with the same settings."""
    path = folder / SETTINGS
    now = {"format": FORMAT, "batch": source.batch, **json.loads(json.dumps(dict(source.entry)))}
    if not path.exists():
        if (folder / MANIFEST).exists():
            raise PitError(f"'{folder}' already holds part data of another origin; take another folder.")
        write_text_atomic(path, json.dumps(now, indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_text("utf-8"))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PitError(f"'{path}' is damaged, so the run cannot go on; take another folder.") from error
    if changed:
        key = changed[0]
        raise PitError(
            f"'{folder}' was begun with {key} {_short(before.get(key))}, not {_short(now.get(key))}; give "
            "the same as before to go on, or take another folder."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


class Journal:
    """What became of each picture, a line as soon as it is known; the last one may be torn by a power cut."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self.lines: dict[int, dict[str, Any]] = {}
        self._listed = -1  # how many pictures the manifest is known to have told of
        if self.path.exists():
            self._read()

    def add(self, index: int, fate: dict[str, Any]) -> None:
        """Tell what became of a picture whose files are all written."""
        line = {"index": index, **fate}
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PitError(f"'{self.path}' cannot be written: {error.strerror or error}.") from error
        self.lines[index] = line

    def below(self, count: int) -> int:
        return sum(index < count for index in self.lines)

    def wholes(self) -> list[Whole]:
        """The wholes that are complete, in the order of the pictures."""
        return [_whole(self.lines[i]["whole"]) for i in sorted(self.lines) if "whole" in self.lines[i]]

    def first_reason(self) -> str:
        return str(self.lines[min(self.lines)].get("rejected", ""))

    def write_manifest_now_and_then(self) -> None:
        """Seldom enough that a long run spends its time on pictures, not on lists of them."""
        if len(self.lines) - self._listed >= max(16, len(self.lines) // 8):
            self.write_manifest()

    def write_manifest(self) -> None:
        if len(self.lines) != self._listed and (wholes := self.wholes()):
            write_manifest(self.folder / MANIFEST, wholes)
            self._listed = len(self.lines)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            with self.path.open("rb+") as file:
                file.truncate(len(data) - len(torn))
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                line = json.loads(text)
                self.lines[int(line["index"])] = line
                if "whole" in line:
                    _whole(line["whole"])
            except (ValueError, TypeError, KeyError) as error:
                raise PitError(
                    f"Line {number} of '{self.path}' is damaged; delete that line to make its picture again."
                ) from error


def _whole(line: Mapping[str, Any]) -> Whole:
    boxes = tuple(None if box is None else tuple(box) for box in line["boxes"])
    return Whole(line["target"], tuple(line["parts"]), boxes, line["set"], line["provenance"])
