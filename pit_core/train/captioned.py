"""Pictures with captions as training data: rows {image_file, text}, decoded on the fly or encoded once.

A picture that cannot be read is reported and left out, never replaced by another or by a blank one.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import PitError
from ..files import existing_file, save_tensors
from ..parts.canvas import flatten
from ..parts.look import Skipped, look_at, report_skipped
from ..pictures import read_picture
from .loop import Data, Item

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One example: a picture file below the image root, and its caption."""

    image_file: str
    text: str


@dataclass(frozen=True)
class Picture:
    """A row whose picture can be read: where it is, its content's SHA-256, and its size in pixels."""

    path: Path
    text: str
    sha256: str
    width: int
    height: int


# rows


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a JSON list or of JSON lines. Other entries of a row are ignored.

    Raises PitError for a file that is neither, and for a row without image_file and text, naming its number.
    """
    path = existing_file(path)
    rows = [_row(value, number, path.name) for number, value in read_json_rows(path)]
    if not rows:
        raise PitError(f"'{path.name}' holds no rows; expected {{image_file, text}} ones.")
    return rows


def read_json_rows(path: Path) -> list[tuple[int, Any]]:
    """The values of a JSON list or of JSON lines with their numbers from 1; PitError for what is neither."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            return list(enumerate(json.loads(text), start=1))
        lines = enumerate(text.split("\n"), start=1)
        return [(number, json.loads(line)) for number, line in lines if line.strip()]
    except (ValueError, RecursionError) as error:
        raise PitError(f"'{path.name}' is neither a JSON list nor JSON lines ({error}).") from error


def _row(value: Any, number: int, name: str) -> Row:
    file = value.get("image_file") if isinstance(value, dict) else None
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(file, str) or not file or not isinstance(text, str):
        raise PitError(f"Row {number} of '{name}' should be {{image_file, text}} with two texts.")
    parts = PurePosixPath(file.replace("\\", "/")).parts
    if ".." in parts or "\0" in file or parts[0] == "/" or PureWindowsPath(file).drive:
        raise PitError(f"Row {number} of '{name}' names '{file[:100]}', which leaves the image folder.")
    return Row(file, text)


# looking through the pictures once


def scan(
    rows: Sequence[Row], images: Path, index: Path, *, quiet: bool = False
) -> tuple[list[Picture], list[Skipped]]:
    """Decode every row's picture once; those that can be read, in order, and those that cannot.

    What was found is kept in the file `index`, so that another run only looks at new and changed files.
    Raises PitError when no picture can be read.
    """
    found = look_at([row.image_file for row in rows], images, index, quiet=quiet)
    pictures, skipped = [], []
    for row in rows:
        entry = found[row.image_file]
        if "error" in entry:
            skipped.append(Skipped(row.image_file, entry["error"]))
        else:
            size = (entry["sha256"], entry["width"], entry["height"])
            pictures.append(Picture(images / row.image_file, row.text, *size))
    report_skipped(skipped, len(rows), "rows")
    if not pictures:
        raise PitError(f"None of the {len(rows)} pictures can be read; the first: {skipped[0].reason}")
    return pictures, skipped


# one picture


def centre_square(image: Image.Image, side: int) -> tuple[Image.Image, list[int]]:
    """The short edge scaled to `side`, the middle of the long one kept: RGB, with SDXL's time ids.

    The ids are (original height, original width, crop top, crop left, side, side). Podell et al. 2023, "SDXL"
    (arXiv 2307.01952), section 2.2. Transparency is laid on white.
    """
    square, (left, top) = centre_crop(image, (side, side))
    return square, [image.height, image.width, top, left, side, side]


def centre_crop(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """The picture scaled until it covers `size` (width, height), and its middle: RGB, with (left, top)."""
    scale = max(size[0] / image.width, size[1] / image.height)
    width, height = max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale))
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    resized = flatten(image).resize((width, height), Image.Resampling.LANCZOS)
    return resized.crop((left, top, left + size[0], top + size[1])), (left, top)


def as_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # HWC -> CHW


class Captioned:
    """Decoded pictures and tokenised captions, made anew for every batch: what `Encoders` reads.

    `tokenize` takes captions to ids (B, encoders, T), `preprocess` a picture to the normalised pixels
    (1, 3, h, w) that an image encoder reads; without one there are none.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        resolution: int,
        tokenize: Callable[[Sequence[str]], Tensor],
        preprocess: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        self.pictures, self.resolution = pictures, resolution
        self.tokenize, self.preprocess = tokenize, preprocess

    def __len__(self) -> int:
        return len(self.pictures)

    def fetch(self, items: Sequence[Item]) -> Tensors:
        chosen = [self.pictures[index] for _, index in items]
        images = [flatten(read_picture(picture.path)) for picture in chosen]
        squares, ids = zip(*(centre_square(image, self.resolution) for image in images), strict=True)
        raw = {
            "pixels": torch.stack([as_pixels(square) for square in squares]),
            "time_ids": torch.tensor(ids, dtype=torch.float32),
            "ids": self.tokenize([picture.text for picture in chosen]),
        }
        if self.preprocess is not None:
            raw["clip_pixels"] = torch.cat([self.preprocess(image) for image in images])
        return raw


# encoded once


class Content(Protocol):
    """What a shard's name depends on: an example's text, and the SHA-256 of its pictures."""

    @property
    def text(self) -> str: ...

    @property
    def sha256(self) -> str: ...


class Shards:
    """Encoded examples in safetensors files of `size` rows each, which any process can read at random.

    A shard's name is a hash of what went into it: the pictures' content, the captions, and `key` (the models
    and settings that encoded them). So a shard is right or absent, and an interrupted build goes on.
    """

    def __init__(self, folder: Path, pictures: Sequence[Content], key: str, size: int = 64) -> None:
        self.folder, self.pictures, self.key, self.size = folder, pictures, key, size
        starts = range(0, len(pictures), size)
        self.names = [self._name(pictures[start : start + size]) for start in starts]
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files stay with their process

    def missing(self) -> list[int]:
        """Numbers of the shards that are not on disk yet; of shards with the same content only the first."""
        absent: dict[str, int] = {}
        for number, name in enumerate(self.names):
            if not (self.folder / name).is_file():
                absent.setdefault(name, number)
        return list(absent.values())

    def build(
        self,
        numbers: Iterable[int],
        source: Data,
        encode: Callable[[Tensors], Tensors],
        *,
        batch_size: int = 8,
    ) -> None:
        """Encode and write these shards; `source` hands out the same pictures, `encode` runs the models."""
        for number in numbers:
            rows = range(number * self.size, min((number + 1) * self.size, len(self)))
            parts = [
                encode(source.fetch([(0, row) for row in rows[start : start + batch_size]]))
                for start in range(0, len(rows), batch_size)
            ]
            whole = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
            save_tensors(self.folder / self.names[number], whole, {"key": self.key})

    def fetch(self, items: Sequence[Item]) -> Tensors:
        rows = [self._read(index) for _, index in items]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _name(self, pictures: Sequence[Content]) -> str:
        digest = sha256(self.key.encode())
        for picture in pictures:
            digest.update(f"{picture.sha256} {sha256(picture.text.encode()).hexdigest()}\n".encode())
        return f"{digest.hexdigest()[:40]}.safetensors"

    def _read(self, index: int) -> Tensors:
        number, row = divmod(index, self.size)
        try:
            file = self._file(number)
            return {name: file.get_slice(name)[row].clone() for name in file.keys()}
        except (SafetensorError, OSError, IndexError) as error:
            path = self.folder / self.names[number]
            raise PitError(f"The cached shard '{path}' cannot be read ({error}); delete it.") from error

    def _file(self, number: int) -> Any:
        if number not in self._open:
            while len(self._open) >= 32:
                self._open.popitem(last=False)
            self._open[number] = safe_open(str(self.folder / self.names[number]), framework="pt")
        self._open.move_to_end(number)
        return self._open[number]


def build_together(
    shards: Shards, source: Data, encode: Callable[[Tensors], Tensors], state: Any, *, quiet: bool = False
) -> None:
    """Build what is missing, each process its share. state: accelerate's PartialState; `encode` takes and
    gives tensors on its device."""
    from tqdm.auto import tqdm

    def on_device(raw: Tensors) -> Tensors:
        return encode({name: values.to(state.device) for name, values in raw.items()})

    mine = shards.missing()[state.process_index :: state.num_processes]
    state.wait_for_everyone()  # nobody writes before everybody has seen what is missing
    shards.build(tqdm(mine, "encoding", disable=quiet or not state.is_main_process), source, on_device)
    state.wait_for_everyone()
