"""Tokens of part data in shards: WebDataset tars that hold one safetensors file for each whole.

A shard is complete or absent, and named by what went into it. An index beside the shards, written last,
lists them in order; from it, a training needs neither pictures nor encoder.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from ..errors import PitError
from ..files import load_tensors, replacing, save_tensors, write_text_atomic
from .augment import Augment

KIND = "ip_token_shards"
VERSION = 1
INDEX = "index.json"
SHARDS = "shards"  # the folder of them
SHARD = re.compile(r"[0-9a-f]{40}\.tar")
DTYPES = {"F16": np.float16, "F32": np.float32}
OPEN = 64  # shards that stay mapped into memory

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Index:
    """What a folder of shards holds.

    key: hash of the models and settings that made it. shards: (name, wholes) of each, in order. tokens,
    width: shape of a picture's tokens. encoder, adapter: content hashes of the models.
    """

    key: str
    shards: tuple[tuple[str, int], ...]
    tokens: int
    width: int
    views: int
    augment: Augment
    encoder: str = ""
    adapter: str = ""

    def __len__(self) -> int:
        """Wholes in all shards together."""
        return sum(count for _, count in self.shards)


# writing


def write_shard(path: Path, wholes: Sequence[Mapping[str, Tensor]]) -> None:
    """Write the tokens of some wholes, complete or not at all; the same tokens give the same bytes."""
    with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, tensors in enumerate(wholes):
            data = save({name: tensor.clone() for name, tensor in tensors.items()})
            member = tarfile.TarInfo(f"{number:06d}.safetensors")
            member.size = len(data)
            tar.addfile(member, BytesIO(data))


def write_index(folder: Path, index: Index) -> None:
    """Write the index, complete or not at all."""
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in index.shards)
    values = {"kind": KIND, "version": VERSION, **asdict(index)}
    values.pop("shards")
    write_text_atomic(
        folder / INDEX, json.dumps(values, indent=1)[:-2] + f',\n "shards": [\n{lines}\n ]\n}}\n'
    )


def write_white(folder: Path, key: str, white: Tensor) -> None:
    """Keep a white picture's tokens (T, D), which fill the slots without a picture."""
    save_tensors(_white(folder, key), {"white": white}, {"key": key})


# reading


def read_index(folder: Path) -> Index:
    """The index of a folder. Raises PitError where `pit data embed` has not finished one, and for damage."""
    path = folder / INDEX
    if not path.is_file():
        raise PitError(f"'{folder}' holds no {INDEX}; name the folder of a finished `pit data embed`.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("kind") != KIND:
            raise PitError(f"'{path}' is another kind of file; name the folder of a `pit data embed`.")
        if values.pop("version") != VERSION:
            raise PitError(f"'{path}' has another format version than {VERSION}; embed the data again.")
        shards = tuple((str(name), int(count)) for name, count in values.pop("shards"))
        augment: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.pop("augment").items()
        }
        return Index(shards=shards, augment=Augment(**augment), **values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PitError(f"'{path}' is damaged ({error}); run `pit data embed` again.") from error


def has_white(folder: Path, key: str) -> bool:
    return _white(folder, key).is_file()


def read_white(folder: Path, index: Index) -> Tensor:
    """The white slot's tokens (T, D), float32. Raises PitError for a file that is missing or of others."""
    tensors, _ = load_tensors(_white(folder, index.key))
    white = tensors.get("white")
    if white is None or tuple(white.shape) != (index.tokens, index.width):
        raise PitError(
            f"'{_white(folder, index.key)}' does not hold the white tokens of this folder; delete it and run "
            "`pit data embed` again."
        )
    return white.float()


def _white(folder: Path, key: str) -> Path:
    return folder / f"white-{key[:16]}.safetensors"


def unused_shards(folder: Path, index: Index) -> list[Path]:
    """Shards that lie beside those of the index and are not named there: of earlier data or settings."""
    named = {name for name, _ in index.shards}
    return sorted(
        path
        for path in (folder / SHARDS).iterdir()
        if SHARD.fullmatch(path.name) and f"{SHARDS}/{path.name}" not in named and path.is_file()
    )


class Shard:
    """A shard on disk: number of a whole -> its arrays, as views of the file, of which only what is used is
    read. Raises PitError for a shard that is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with tarfile.open(path, "r:") as tar:
                self._places = [(member.offset_data, member.size) for member in tar]
            self._bytes = np.memmap(path, np.uint8, "r")
        except (OSError, ValueError, tarfile.TarError) as error:
            raise self._broken(error) from error

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Arrays:
        try:
            offset, size = self._places[number]
            return _arrays(self._bytes[offset : offset + size])
        except (IndexError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> PitError:
        return PitError(
            f"The shard '{self.path}' cannot be read ({error}); delete it and run `pit data embed` again."
        )


class ShardFolder:
    """All wholes of an index, by number. It can be handed to worker processes."""

    def __init__(self, folder: Path, index: Index, most_open: int = OPEN) -> None:
        self.folder, self.index, self.most_open = folder, index, most_open
        self._starts = np.cumsum([0, *(count for _, count in index.shards)])
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files stay with their process

    def __getitem__(self, number: int) -> Arrays:
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        arrays = self._shard(shard)[number - int(self._starts[shard])]
        if arrays["target"].shape != (self.index.tokens, self.index.width):
            raise PitError(
                f"The shard '{self.index.shards[shard][0]}' holds tokens of shape {arrays['target'].shape}, "
                f"but its index says {(self.index.tokens, self.index.width)}; run `pit data embed` again."
            )
        return arrays

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            while len(self._open) >= self.most_open:
                self._open.popitem(last=False)
            self._open[number] = Shard(self.folder / self.index.shards[number][0])
        self._open.move_to_end(number)
        return self._open[number]


def _arrays(data: np.ndarray) -> Arrays:
    """The arrays of a safetensors file in memory, as views: its length, a JSON header, the numbers."""
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    return {name: _view(data[start:], entry) for name, entry in header.items() if name != "__metadata__"}


def _view(data: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
    begin, shape = entry["data_offsets"][0], entry["shape"]
    return np.frombuffer(data, DTYPES[entry["dtype"]], prod(shape), begin).reshape(shape)


def as_tensor(array: np.ndarray) -> Tensor:
    """A copy of what a view shows."""
    return torch.from_numpy(np.array(array))
