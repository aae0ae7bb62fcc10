"""`pit data embed --ray`: the stages of `embed` as a Ray Data pipeline, on this computer or on a cluster.

Decode and crop (tasks), encode (actors, each of which holds the models), write (tasks). What travels is a
shard, named as ever by its content, so the shards are those of `embed`, whoever makes them. A process that
dies is replaced by Ray and its shards are begun again; those that are written are never made twice.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import PitError
from .embed import Embedded, Encoder, Models, Plan, finish, look_through, make_plan, progress, store
from .views import Job, Recipe, crop, decode, make_jobs

BLOCKS = 10_000  # most pieces that Ray keeps account of: beyond, several shards go together
RETRIES = 3  # of a shard whose process has died
CALLS = 1000  # shards that a process decodes before another takes its place

Row = dict[str, Any]
Load = Callable[[], Encoder]


@dataclass(frozen=True)
class Cluster:
    """Where to run, and with how much.

    address: of a running cluster, all of whose computers see the same paths; None: one on this computer, for
    this run. actors: processes that encode; None: one for each GPU, or one. gpus: of each actor; None: 1
    where there are any. decoders: most processes that decode; None: as Ray sees fit.
    """

    address: str | None = None
    actors: int | None = None
    gpus: float | None = None
    decoders: int | None = None


@dataclass(frozen=True)
class _Work:
    """What every stage knows."""

    folder: Path
    out: Path
    recipe: Recipe

    def is_done(self, row: Row) -> bool:
        """Also true where a process has died after writing, and its work is handed out again."""
        return (self.out / row["name"]).is_file()


def embed_on_ray(
    manifest: str | os.PathLike[str],
    out: str | os.PathLike[str],
    load: Load,
    recipe: Recipe,
    cluster: Cluster | None = None,
    *,
    shard_size: int = 32,
    prune: bool = False,
    quiet: bool = False,
) -> Embedded:
    """`embed` on Ray, with the same result; `load` is called in each process that encodes.

    The recipe's `pixels` are set to what the encoder sees. A Ray that runs in this process is used as it is.
    Raises PitError as `embed`, where Ray is not installed or does not answer, and for more actors than fit.
    """
    manifest, out, cluster = Path(manifest).resolve(), Path(out).resolve(), cluster or Cluster()
    found = look_through(manifest, out, quiet=quiet)
    with _ray(cluster.address) as ray, _failures_named(ray):
        actors, gpus = _place(cluster, ray.cluster_resources())
        models, white = _known(ray, load, gpus)
        recipe = replace(recipe, pixels=models.pixels)
        jobs = make_jobs(found.wholes, found.hashes, recipe)
        plan = make_plan(jobs, manifest.parent, out, recipe, models, shard_size)
        missing = plan.missing()
        with progress(plan, missing, quiet=quiet) as bar:
            for row in _written(ray, plan, missing, load, actors, gpus, cluster.decoders):
                if row["error"]:
                    raise PitError(row["error"])
                bar.update(row["wholes"])
    return finish(plan, lambda: white, len(missing), found.skipped, prune=prune)


# the pipeline


def _written(
    ray: Any,
    plan: Plan,
    missing: Sequence[int],
    load: Load,
    actors: int,
    gpus: float,
    decoders: int | None,
) -> Iterator[Row]:
    """Make the missing shards; a row {"name", "wholes", "error"} for each, as they come."""
    if not missing:
        return
    data, work = ray.data, _Work(plan.folder, plan.out, plan.recipe)
    rows = [{"name": plan.names[number], "jobs": pickle.dumps(plan.shards[number])} for number in missing]
    pipeline = (
        data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS))
        .map(
            partial(_decode, work),
            compute=data.TaskPoolStrategy(size=decoders),
            num_cpus=1,
            # Without an argument that actors do not have, Ray Data would decode inside the actors.
            max_calls=CALLS,
            ray_remote_args_fn=_task_retries,
        )
        .map(
            _Encode,
            fn_constructor_args=(work, load),
            compute=data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=gpus,
            ray_remote_args_fn=_actor_retries,
        )
        .map(partial(_write, work), num_cpus=1, ray_remote_args_fn=_task_retries)
    )
    yield from pipeline.iter_rows()


def _task_retries() -> Row:
    return {"max_retries": RETRIES}


def _actor_retries() -> Row:
    return {"max_restarts": -1, "max_task_retries": RETRIES}


def _decode(work: _Work, row: Row) -> Row:
    """Decode and crop: pixels (N, 3, S, S) of all the shard's squares. One stage, because pictures as they
    come from a file are many times larger than what is encoded."""
    done = {**row, "pixels": np.zeros((0, 3, work.recipe.pixels, work.recipe.pixels), np.uint8), "error": ""}
    if work.is_done(row):
        return done
    try:
        squares = [crop(job, decode(job, work.folder), work.recipe) for job in _jobs(row)]
    except PitError as error:  # not raised: Ray would bury the sentence in a traceback, and try again
        return {**done, "error": str(error)}
    return {**done, "pixels": torch.cat(squares).numpy()}


class _Encode:
    """The actor: tokens (N, T, D) of a shard's squares."""

    def __init__(self, work: _Work, load: Load) -> None:
        self.work, self.encode = work, load()

    def __call__(self, row: Row) -> Row:
        pixels, error = row.pop("pixels"), row["error"]
        shape = (0, self.encode.models.tokens, self.encode.models.width)
        done = {**row, "tokens": np.zeros(shape, np.float16)}
        if error or self.work.is_done(row):
            return done
        try:
            return {**done, "tokens": self.encode(torch.from_numpy(np.array(pixels))).numpy()}
        except PitError as problem:
            return {**done, "error": str(problem)}


def _write(work: _Work, row: Row) -> Row:
    jobs, error = _jobs(row), row["error"]
    if not error and not work.is_done(row):
        tokens = torch.from_numpy(np.array(row["tokens"]))
        try:
            store(work.out / row["name"], jobs, tokens, work.recipe.views)
        except PitError as problem:
            error = str(problem)
    return {"name": row["name"], "wholes": len(jobs), "error": error}


def _jobs(row: Row) -> tuple[Job, ...]:
    return tuple(pickle.loads(row["jobs"]))  # our own, from `_written`


# the cluster


@contextmanager
def _ray(address: str | None) -> Iterator[Any]:
    """Ray, running and quiet: nothing is reported to anybody, and what it has to say is in its files."""
    from accelerate.utils import patch_environment

    with patch_environment(RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal"):
        yield from _running(address)


def _running(address: str | None) -> Iterator[Any]:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise PitError(
            "--ray needs Ray, which is not installed; install the extra: pip install -e '.[scale]'"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address is None:
            ray.init("local", include_dashboard=False, **quiet)
        else:
            ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"at '{address}'" if address else "on this computer"
        raise PitError(f"Ray does not start {where}: {_first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _failures_named(ray: Any) -> Iterator[None]:
    """What Ray itself gives up on, in a sentence: it has tried again by then."""
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error.__cause__ or error
        raise PitError(
            f"A process on Ray failed, {RETRIES} retries included ({type(cause).__name__}: "
            f"{_first_line(cause)}); with that mended run the command again: it goes on from here."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _place(cluster: Cluster, resources: Mapping[str, float]) -> tuple[int, float]:
    """(actors, GPUs of each). Raises PitError for more than there is, which Ray would wait for in silence."""
    there = resources.get("GPU", 0.0)
    gpus = min(1.0, there) if cluster.gpus is None else cluster.gpus
    cpus = resources.get("CPU", 0.0)
    fitting = min(int(there // gpus), int(cpus) - 1) if gpus else 1
    actors = cluster.actors or max(fitting, 1)
    if actors * gpus > there or actors + 1 > cpus:
        raise PitError(
            f"{actors} actors with {gpus:g} GPUs each and a process that decodes need {actors + 1} CPUs and "
            f"{actors * gpus:g} GPUs, but Ray has {cpus:g} and {there:g}; ask for fewer."
        )
    return actors, gpus


def _known(ray: Any, load: Load, gpus: float) -> tuple[Models, Tensor]:
    """What the models are, and a white picture's tokens, from where they will run: the computer that hands
    out the work need not be able to hold them."""
    answer = ray.get(ray.remote(num_cpus=1, num_gpus=gpus)(_look).remote(load))
    if isinstance(answer, str):
        raise PitError(answer)
    models, white = answer
    return models, torch.from_numpy(np.array(white))


def _look(load: Load) -> tuple[Models, np.ndarray] | str:
    try:
        encode = load()
        return encode.models, encode.white().numpy()
    except PitError as error:
        return str(error)
