"""`pit data embed`: every picture of a data set to IP tokens, once.

Stages, each a plain function: decode and crop (`views`), encode, write (`shards`). A shard's name is a hash
of its pictures' content, the recipe and the models, so a shard is right or absent: what is there is skipped,
and a run that was killed goes on with the first shard that it did not finish.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import PitError
from ..files import hash_tensors
from ..ip_adapter.adapter import IPAdapter
from ..ip_adapter.encode import encode_tokens, null_pixels
from ..ip_adapter.encoder import ImageEncoder
from .look import Skipped, save_skipped
from .manifest import read_manifest
from .scan import Scan, scan
from .shards import (
    SHARDS,
    Index,
    has_white,
    read_white,
    unused_shards,
    write_index,
    write_shard,
    write_white,
)
from .views import Job, Recipe, crop, decode, make_jobs, sort_tokens
from .workers import leave_interrupts_to_the_parent

FORMAT = 1  # of what a shard holds; another one makes other names
STORED = torch.float16


@dataclass(frozen=True)
class Embedded:
    """What `embed` has done: the index it wrote, how many shards were made now, and what was left out; how
    many shards of earlier data or settings are beside them, and whether they were deleted."""

    index: Index
    made: int
    skipped: list[Skipped]
    unused: int = 0
    pruned: bool = False

    def __str__(self) -> str:
        index = self.index
        left_out = f", {len(self.skipped)} pictures left out" if self.skipped else ""
        fate = "deleted" if self.pruned else "not used any more; --prune deletes them"
        older = f" ({self.unused} older ones {fate})" if self.unused else ""
        made = f"{self.made} of them encoded now{older}{left_out}"
        return (
            f"{len(index)} wholes in {len(index.shards)} shards, {made}; "
            f"{index.views} views of a part, {index.tokens} tokens of width {index.width} each"
        )


@dataclass(frozen=True)
class Models:
    """What shards and index say of the models that encode, for whoever does not hold them.

    key: a hash of all that the tokens depend on. pixels: the side of what they see. tokens, width: the shape
    of what they make. encoder, adapter: their content's hashes.
    """

    key: str
    pixels: int
    tokens: int
    width: int
    encoder: str
    adapter: str


class Encoder:
    """The stage that holds models: uint8 pixels (N, 3, S, S) -> tokens (N, T, D) in float16, on the CPU.

    Raises PitError for tokens that float16 cannot hold.
    """

    def __init__(self, encoder: ImageEncoder, adapter: IPAdapter, batch: int = 32) -> None:
        if batch < 1:
            raise PitError(f"Expected a batch of at least 1 picture, got {batch}.")
        self.encoder, self.adapter, self.batch = encoder, adapter, batch
        weight = next(encoder.model.parameters())
        models = {
            "encoder": encoder.content_hash or hash_tensors(encoder.model.state_dict()),
            "projection": hash_tensors(adapter.projector.state_dict()),
            "pixels": [encoder.image_size, encoder.mean, encoder.std],
            "dtypes": [str(weight.dtype), str(next(adapter.projector.parameters()).dtype), str(STORED)],
        }
        self.models = Models(
            key=_digest(models),
            pixels=encoder.image_size,
            tokens=adapter.num_tokens,
            width=adapter.cross_attention_dim,
            encoder=encoder.content_hash,
            adapter=adapter.content_hash,
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.cat([self._tokens(self._normalised(rows)) for rows in pixels.split(self.batch)])

    def white(self) -> Tensor:
        """A white picture's tokens (T, D)."""
        size, mean, std = self.encoder.image_size, self.encoder.mean, self.encoder.std
        return self._tokens(null_pixels("white", size=size, mean=mean, std=std))[0]

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.encoder.mean, self.encoder.std))
        return (pixels.float() / 255 - mean) / std

    def _tokens(self, pixels: Tensor) -> Tensor:
        tokens = encode_tokens(self.encoder, self.adapter, pixels, self.batch).to("cpu", STORED)
        if not torch.isfinite(tokens).all():
            raise PitError(f"{self.adapter.name} gives tokens too large for float16; it may be damaged.")
        return tokens


@dataclass(frozen=True)
class Plan:
    """All shards of a data set, in order: their names, and the jobs that each holds."""

    folder: Path  # the manifest's
    out: Path
    recipe: Recipe
    models: Models
    key: str  # of models and recipe together
    names: tuple[str, ...]
    shards: tuple[tuple[Job, ...], ...]

    def path(self, number: int) -> Path:
        return self.out / self.names[number]

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet; of those with the same content only the first."""
        absent: dict[str, int] = {}
        for number, name in enumerate(self.names):
            if not (self.out / name).is_file():
                absent.setdefault(name, number)
        return list(absent.values())

    def pixels(self, job: Job) -> Tensor:
        """Decode and crop: uint8 (N, 3, S, S)."""
        return crop(job, decode(job, self.folder), self.recipe)


def make_plan(
    jobs: Sequence[Job], folder: Path, out: Path, recipe: Recipe, models: Models, shard_size: int
) -> Plan:
    """Cut the jobs into shards of `shard_size` wholes and name them."""
    if shard_size < 1:
        raise PitError(f"Expected shards of at least 1 whole, got {shard_size}.")
    key = _digest({"format": FORMAT, "models": models.key, "recipe": recipe.settings()})
    shards = tuple(tuple(jobs[start : start + shard_size]) for start in range(0, len(jobs), shard_size))
    names = tuple(
        f"{SHARDS}/{_digest([key, *(job.content() for job in shard)])[:40]}.tar" for shard in shards
    )
    return Plan(folder, out, recipe, models, key, names, shards)


def look_through(manifest: Path, out: Path, *, quiet: bool = False) -> Scan:
    """What of the data set can be used; what cannot is listed in `out`. Raises PitError as `embed`."""
    found = scan(read_manifest(manifest), manifest.parent, out / "scan.json", quiet=quiet)
    save_skipped(out / "skipped.jsonl", found.skipped)
    return found


def embed(
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encode: Encoder,
    recipe: Recipe,
    *,
    shard_size: int = 32,
    workers: int = 0,
    prune: bool = False,
    quiet: bool = False,
) -> Embedded:
    """Encode the data set of a manifest into `out`; go on where an earlier run stopped.

    Writes shards/, the white slot's tokens, scan.json (what is known of the pictures), skipped.jsonl
    (pictures that cannot be used), and index.json when all is done. `workers` processes decode and crop.
    `prune` then deletes the shards of earlier data or settings, which nothing else may be using or writing.

    Raises PitError for a manifest or pictures that cannot be read, settings out of range, models that do not
    belong together, and a disk that is full.
    """
    manifest, out = Path(manifest), Path(out)
    found = look_through(manifest, out, quiet=quiet)
    jobs = make_jobs(found.wholes, found.hashes, recipe)
    plan = make_plan(jobs, manifest.parent, out, recipe, encode.models, shard_size)
    missing = plan.missing()
    with progress(plan, missing, quiet=quiet) as bar, _dead_workers_named():
        for number, pixels in _prepared(plan, missing, workers):
            make_shard(plan, number, pixels, encode)
            bar.update(len(pixels))
    return finish(plan, encode.white, len(missing), found.skipped, prune=prune)


def progress(plan: Plan, missing: Sequence[int], *, quiet: bool) -> Any:
    """A bar that counts wholes, with what is there already."""
    from tqdm.auto import tqdm

    total = sum(len(shard) for shard in plan.shards)
    left = sum(len(plan.shards[number]) for number in missing)
    return tqdm(total=total, initial=total - left, desc="encoding", unit="whole", disable=quiet)


def make_shard(plan: Plan, number: int, pixels: Sequence[Tensor], encode: Encoder) -> None:
    """Encode and write one shard, whose jobs' pixels these are."""
    store(plan.path(number), plan.shards[number], encode(torch.cat(list(pixels))), plan.recipe.views)


def store(path: Path, jobs: Sequence[Job], tokens: Tensor, views: int) -> None:
    """Write one shard: the tokens (N, T, D) of its jobs' squares, in the order of `crop`."""
    counts = [1 + len(job.parts) * views + len(job.references) for job in jobs]
    rows = zip(jobs, tokens.split(counts), strict=True)
    write_shard(path, [sort_tokens(job, own, views) for job, own in rows])


def finish(
    plan: Plan, white: Callable[[], Tensor], made: int, skipped: list[Skipped], *, prune: bool
) -> Embedded:
    """With every shard in place: the white slot (T, D), unless it is there, the index, and what it leaves."""
    if not has_white(plan.out, plan.key):
        write_white(plan.out, plan.key, white())
    models = plan.models
    index = Index(
        key=plan.key,
        shards=tuple((name, len(jobs)) for name, jobs in zip(plan.names, plan.shards, strict=True)),
        tokens=models.tokens,
        width=models.width,
        views=plan.recipe.views,
        augment=plan.recipe.augment,
        encoder=models.encoder,
        adapter=models.adapter,
    )
    read_white(plan.out, index)
    write_index(plan.out, index)
    unused = unused_shards(plan.out, index)
    for path in unused if prune else ():
        path.unlink()
    return Embedded(index, made, skipped, len(unused), prune)


class _Pixels(Dataset[Tensor | PitError]):
    """Jobs decoded and cropped, for worker processes. Errors are handed over instead of raised, because a
    DataLoader would bury their sentence in a traceback."""

    def __init__(self, plan: Plan, jobs: Sequence[Job]) -> None:
        self.plan, self.jobs = plan, jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, number: int) -> Tensor | PitError:
        try:
            return self.plan.pixels(self.jobs[number])
        except PitError as error:
            return error


def _prepared(plan: Plan, numbers: Sequence[int], workers: int) -> Iterator[tuple[int, list[Tensor]]]:
    """(number, pixels of each of its jobs), shard after shard, with the next ones already in the making."""
    source = _Pixels(plan, [job for number in numbers for job in plan.shards[number]])
    loader = DataLoader(
        source, batch_size=None, num_workers=workers, worker_init_fn=leave_interrupts_to_the_parent
    )
    ready = iter(loader)
    for number in numbers:
        yield number, [_or_raise(next(ready)) for _ in plan.shards[number]]


def _or_raise(pixels: Tensor | PitError) -> Tensor:
    if isinstance(pixels, PitError):
        raise pixels
    return pixels


@contextmanager
def _dead_workers_named() -> Iterator[None]:
    """torch tells of a worker's death by a signal, so the error can come from anywhere. Where the worker had
    pixels ready, asking it for them can fail before that, with an error of the connection."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise PitError(
            "A process that decodes pictures was ended, often for want of memory; run the command again, "
            "perhaps with fewer --workers: it goes on from here."
        ) from error


def _digest(values: object) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
