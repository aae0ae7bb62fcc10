"""The training loop that every method shares: exact resume, EMA, atomic checkpoints, one or many processes.

Everything random in a step is a pure function of (seed, step, row): the order of the data, the noise, the
dropout of conditions. So a resumed run continues bit for bit, and several processes draw exactly what one
process would.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..errors import PitError
from ..files import check_shapes, load_tensors, replacing, save_tensors, write_text_atomic
from ..parts.workers import leave_interrupts_to_the_parent
from . import fsdp

Item = tuple[int, int]
"""(epoch, index) of one training example: what an augmentation may depend on, together with its own seed."""


@dataclass(frozen=True)
class LoopConfig:
    """What the loop itself needs to know; a method's own settings live with the method."""

    steps: int
    batch_size: int  # examples per optimiser step, over all processes and accumulation steps
    lr: float = 1e-4
    schedule: str = "constant"  # or "cosine"; both start with a linear warm-up
    warmup: int = 0
    final_lr: float = 0.0  # fraction of ``lr`` at the end of the cosine
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    accumulate: int = 1
    ema_decay: float = 0.9999
    precision: str = "no"  # or "bf16", "fp16"
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    log_every: int = 10
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise PitError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.schedule not in ("constant", "cosine"):
            raise PitError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}.")
        if self.precision not in ("no", "bf16", "fp16"):
            raise PitError(f"precision must be 'no', 'bf16' or 'fp16', got {self.precision!r}.")
        if not (0.0 <= self.ema_decay < 1.0):
            raise PitError(f"ema_decay must lie in [0, 1), got {self.ema_decay}.")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise PitError(f"lr must be a positive number, got {self.lr}.")
        for name in ("warmup", "final_lr", "weight_decay", "grad_clip", "seed", "workers"):
            if not (0 <= getattr(self, name) < math.inf):
                raise PitError(f"{name} must be zero or a positive number, got {getattr(self, name)}.")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise PitError(f"betas must be two numbers in [0, 1), got {list(self.betas)}.")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (counted from 0)."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        done = min(max(step - self.warmup, 0) / max(self.steps - self.warmup, 1), 1.0)
        return self.lr * warm * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


class Data(Protocol):
    """A data set that hands out whole batches."""

    def __len__(self) -> int: ...

    def fetch(self, items: Sequence[Item]) -> Any:
        """The batch of these (epoch, index) items; must depend on nothing else that changes."""
        ...


@runtime_checkable
class StepData(Protocol):
    """A data set that gives all of a step's examples something in common, such as their size."""

    def of_step(self, first: Item) -> Data:
        """What a whole step is fetched from, whichever process and part of it asks; ``first`` is its first
        item."""
        ...


class Draws:
    """Random numbers of one step for this process's rows, the same that a single process would draw."""

    def __init__(
        self, seed: int, step: int, rows: slice, total: int, device: torch.device | str = "cpu"
    ) -> None:
        # 64-bit mixing keeps neighbouring (seed, step) pairs apart.
        mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % 2**63
        self._generator = torch.Generator().manual_seed(mixed)
        self._rows, self._total, self._device = rows, total, device

    def randn(self, *shape: int) -> Tensor:
        """Standard normals, (rows, *shape)."""
        return self._mine(torch.randn(self._total, *shape, generator=self._generator))

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (rows, *shape)."""
        return self._mine(torch.rand(self._total, *shape, generator=self._generator))

    def randint(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), (rows, *shape)."""
        return self._mine(torch.randint(high, (self._total, *shape), generator=self._generator))

    def common(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), shape as given: one decision for the whole batch, the same on every process."""
        return torch.rand(shape, generator=self._generator).to(self._device)

    def _mine(self, values: Tensor) -> Tensor:
        return values[self._rows].to(self._device)


class Objective(nn.Module):
    """A method's loss as a module: the trainable parts and the frozen ones it needs.

    Only parameters with ``requires_grad`` are trained, averaged and saved. ``blocks`` names the submodules
    that FSDP gathers one at a time; none: all at once.
    """

    @property
    def blocks(self) -> list[str]:
        return []

    def forward(self, batch: Any, draws: Draws) -> dict[str, Tensor]:
        """Losses of this process's rows, each a mean over rows; ``"loss"`` is the one that is minimised."""
        raise NotImplementedError

    def train_mode(self) -> None:
        """Put trainable parts in training mode; frozen ones stay in eval."""
        self.train()

    def optimizer(self, config: LoopConfig) -> torch.optim.Optimizer:
        """What steps the trainable parameters: AdamW, unless a method has its own.

        The loop sets each parameter group's learning rate to the schedule's, times the group's "lr_scale" if
        it has one, and clips the gradients of each group by themselves. FSDP takes AdamW in one group only.
        """
        return torch.optim.AdamW(
            list(_trainable(self).values()),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )


@dataclass
class Result:
    """How a call of ``train`` ended."""

    step: int
    finished: bool
    losses: dict[str, float]
    seconds: float


class _Batches(Dataset[Any]):
    """Batch number -> batch, so that DataLoader workers prefetch whole batches in order."""

    def __init__(self, data: Data, config: LoopConfig, rank: int, world: int) -> None:
        self.data, self.config, self.rank, self.world = data, config, rank, world

    def __getitem__(self, number: int) -> Any:
        step, part = divmod(number, self.config.accumulate)
        rows = _rows(self.config, part, self.rank, self.world)
        start = step * self.config.batch_size
        seed, length = self.config.seed, len(self.data)
        data = self.data
        if isinstance(data, StepData):
            data = data.of_step(_item(seed, start, length))
        positions = range(start + rows.start, start + rows.stop)
        return data.fetch([_item(seed, place, length) for place in positions])


def _rows(config: LoopConfig, part: int, rank: int, world: int) -> slice:
    micro = config.batch_size // (config.accumulate * world)
    start = (part * world + rank) * micro
    return slice(start, start + micro)


_ORDER: dict[tuple[int, int, int], list[int]] = {}


def _item(seed: int, position: int, length: int) -> Item:
    epoch, place = divmod(position, length)
    key = (seed, epoch, length)
    if key not in _ORDER:
        while len(_ORDER) > 2:
            _ORDER.pop(next(iter(_ORDER)))
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        _ORDER[key] = torch.randperm(length, generator=generator).tolist()
    return epoch, _ORDER[key][place]


def train(
    objective: Objective,
    data: Data,
    config: LoopConfig,
    out: str | Path,
    *,
    validate: Callable[[int], dict[str, float]] | None = None,
    max_seconds: float | None = None,
    quiet: bool = False,
    description: str = "training",
) -> Result:
    """Train until ``config.steps``, resuming from the newest checkpoint in ``out``.

    ``validate`` is called after every save, with the averaged (EMA) weights in place. Ctrl-C and
    ``max_seconds`` save and return with ``finished=False``. At the end the objective holds the averaged
    weights.

    Raises PitError when the batch does not divide over the processes, when the checkpoint belongs to other
    settings, and when the loss or a gradient is not finite (nothing is saved then).

    Launched for FSDP, a sharded copy of the objective is trained; see ``fsdp``. Checkpoints are the same.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    out = Path(out)
    # accelerate remembers the first precision of a process; another stage may want another one.
    AcceleratorState._reset_state()
    sharding = fsdp.wanted(config.precision)
    with fsdp.kept_from_accelerate():
        accelerator = Accelerator(mixed_precision=config.precision, cpu=not torch.cuda.is_available())
    world, rank = accelerator.num_processes, accelerator.process_index
    if config.batch_size % (config.accumulate * world):
        raise PitError(
            f"batch_size {config.batch_size} does not divide into {config.accumulate} accumulation steps on "
            f"{world} processes; choose a multiple of their product."
        )
    if len(data) < 1:
        raise PitError("the training set is empty; expected at least one example.")

    named = _trainable(objective)
    if not named:
        raise PitError("nothing to train: no parameter of this objective requires a gradient.")
    optimizer = objective.optimizer(config)
    if sharding and (type(optimizer) is not torch.optim.AdamW or len(optimizer.param_groups) > 1):
        raise PitError("this method has its own optimizer, which FSDP cannot spread; launch without it.")
    step = 0
    newest = latest_checkpoint(out)
    ema = EMAModel(list(named.values()), decay=config.ema_decay, foreach=True)
    if newest is not None:
        step = _load(newest, named, optimizer, ema, accelerator.scaler, config)
    sharding = sharding and world > 1
    active = objective  # what is trained
    if sharding:
        model = fsdp.spread(objective, objective.blocks, optimizer, ema, accelerator.device)
        active = model
    else:
        model, optimizer = accelerator.prepare(objective, optimizer)
    # The parameters may have moved; the averages follow them.
    named = _trainable(active)
    ema.to(accelerator.device)

    loader = DataLoader(
        _Batches(data, config, rank, world),
        batch_size=None,
        sampler=range(step * config.accumulate, config.steps * config.accumulate),
        num_workers=config.workers,
        worker_init_fn=leave_interrupts_to_the_parent,
    )
    batches = iter(loader)
    active.train_mode()
    losses: dict[str, float] = {}
    started, stopped = time.monotonic(), False
    hidden = quiet or not accelerator.is_main_process
    bar = tqdm(total=config.steps, initial=step, desc=description, disable=hidden)

    def save_now() -> None:
        copies = fsdp.gather(named, ema, optimizer, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            saved = _save(out, step, copies, ema.optimization_step, accelerator.scaler, config, losses)
            found: dict[str, float] = {}
            # Only now, so that whatever befalls the validation costs no steps.
            if validate and sharding:
                found = _with_copies(objective, copies.averages, validate, step, accelerator.device)
            elif validate:
                found = _with_average(ema, named, objective, validate, step)
            _note(saved, found)
            _log(out, step, {"saved": 1.0, **losses, **found})
        accelerator.wait_for_everyone()

    with _prepared(accelerator, objective), _interrupt_flag() as interrupted:
        while step < config.steps:
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step) * group.get("lr_scale", 1.0)
            losses = _step(accelerator, model, optimizer, batches, config, step, rank, world)
            ema.step(list(named.values()))
            step += 1
            bar.update()
            if step % config.log_every == 0 and accelerator.is_main_process:
                bar.set_postfix({name: f"{value:.4f}" for name, value in losses.items()}, refresh=False)
                _log(out, step, {**losses, "lr": config.lr_at(step - 1)})
            late = max_seconds is not None and time.monotonic() - started > max_seconds
            stopped = _any_process(accelerator, interrupted() or late)
            if step % config.save_every == 0 or step == config.steps or stopped:
                save_now()
            if stopped:
                break
    bar.close()
    if sharding:
        _fill(objective, fsdp.averages(named, ema))
    else:
        ema.copy_to(list(named.values()))
    objective.eval()
    return Result(step, step >= config.steps, losses, time.monotonic() - started)


def _step(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    batches: Iterator[Any],
    config: LoopConfig,
    step: int,
    rank: int,
    world: int,
) -> dict[str, float]:
    """One optimiser step over all accumulation parts; returns the mean losses over all processes."""
    sums: dict[str, Tensor] = {}
    for part in range(config.accumulate):
        batch = _to(next(batches), accelerator.device)
        rows = _rows(config, part, rank, world)
        draws = Draws(config.seed, step, rows, config.batch_size, accelerator.device)
        last = part == config.accumulate - 1
        with _sync(accelerator, model, last), accelerator.autocast():
            parts = model(batch, draws)
            accelerator.backward(parts["loss"] / config.accumulate)
        for name, value in parts.items():
            share = value.detach().float() / config.accumulate
            sums[name] = sums[name] + share if name in sums else share
    losses = {name: float(accelerator.reduce(value, "mean")) for name, value in sums.items()}
    _check_finite("loss", losses["loss"], step)
    accelerator.unscale_gradients()
    for group in optimizer.param_groups:
        norm = nn.utils.clip_grad_norm_(group["params"], config.grad_clip or math.inf)
        if accelerator.scaler is None:  # with fp16 an overflow is expected: the scaler skips the step
            _check_finite("gradient's norm", float(fsdp.whole(norm)), step)
    optimizer.step()
    optimizer.zero_grad()
    return losses


def _check_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise PitError(
            f"the {what} became {value} at step {step}; nothing was saved since the last checkpoint: lower "
            "the learning rate or check the data."
        )


def _any_process(accelerator: Any, flag: bool) -> bool:
    """Whether one process at least says so: they stop together, or they wait for each other forever."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


@contextmanager
def _prepared(accelerator: Any, objective: Objective) -> Iterator[None]:
    """Take off what accelerate has put on the objective, so that another run can prepare it anew."""
    try:
        yield
    finally:
        accelerator.unwrap_model(objective, keep_fp32_wrapper=False)
        objective.__dict__.pop("_is_accelerate_prepared", None)


@contextmanager
def _sync(accelerator: Any, model: Any, last: bool) -> Iterator[None]:
    if hasattr(model, "set_requires_gradient_sync"):  # sharded
        model.set_requires_gradient_sync(last)
        yield
    elif last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    return batch


@contextmanager
def _interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag instead of tearing a step apart; a second one stops at once."""
    hits: list[int] = []

    def handler(number: int, frame: Any) -> None:
        hits.append(number)
        if len(hits) > 1:
            raise KeyboardInterrupt

    try:
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller owns the signals
        previous = {}
    try:
        yield lambda: bool(hits)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


# ----------------------------------------------------------------------------------------------------------
# Checkpoints: a folder per step, complete or absent.


ASIDE = ".replaced-"


def latest_checkpoint(out: str | Path) -> Path | None:
    """The newest complete checkpoint folder under ``out``, or None."""
    folder = Path(out) / "checkpoints"
    _take_back(folder)
    found = _complete(folder)
    return found[-1] if found else None


def _complete(folder: Path) -> list[Path]:
    return sorted(state.parent for state in folder.glob("step-*/state.json"))


def load_average(out: str | Path) -> tuple[int, dict[str, Tensor]]:
    """Step and averaged (EMA) weights of the newest checkpoint under ``out``."""
    newest = latest_checkpoint(out)
    if newest is None:
        raise PitError(f"no checkpoint was found under {out}; train first.")
    return int(_state(newest)["step"]), load_tensors(newest / "ema.safetensors")[0]


def _with_average(
    ema: Any,
    named: dict[str, nn.Parameter],
    objective: Objective,
    validate: Callable[[int], dict[str, float]],
    step: int,
) -> dict[str, float]:
    parameters = list(named.values())
    ema.store(parameters)
    ema.copy_to(parameters)
    objective.eval()
    try:
        with torch.no_grad():
            return validate(step)
    finally:
        ema.restore(parameters)
        objective.train_mode()


def _with_copies(
    objective: Objective,
    averages: dict[str, Tensor],
    validate: Callable[[int], dict[str, float]],
    step: int,
    device: torch.device,
) -> dict[str, float]:
    """As `_with_average`, with an objective that is not itself trained and lies on the CPU otherwise."""
    _fill(objective, averages)
    objective.to(device).eval()
    try:
        with torch.no_grad():
            return validate(step)
    finally:
        objective.to("cpu")


def _trainable(objective: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in objective.named_parameters() if p.requires_grad}


def _fill(objective: Objective, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in _trainable(objective).items():
            parameter.copy_(tensors[name])


def _save(
    out: Path,
    step: int,
    copies: fsdp.Copies,
    ema_steps: int,
    scaler: Any,
    config: LoopConfig,
    metrics: dict[str, float],
) -> Path:
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for broken_off in folder.glob(".writing-*"):
        shutil.rmtree(broken_off)
    work = folder / f".writing-{step:08d}"
    work.mkdir()
    try:
        save_tensors(work / "model.safetensors", copies.weights, {})
        save_tensors(work / "ema.safetensors", copies.averages, {})
        with replacing(work / "optimizer.pt") as temporary:
            torch.save(copies.optimizer, temporary)
        state = {
            "step": step,
            "ema_steps": ema_steps,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "metrics": metrics,
            "config": asdict(config),
        }
        write_text_atomic(work / "state.json", json.dumps(state, indent=1))
        _put(work, folder / f"step-{step:08d}")
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    for old in _complete(folder)[: -config.keep]:
        shutil.rmtree(old)
    return folder / f"step-{step:08d}"


def _note(checkpoint: Path, found: dict[str, float]) -> None:
    """Add a validation's figures to a checkpoint's own."""
    state = _state(checkpoint)
    state["metrics"] |= found
    write_text_atomic(checkpoint / "state.json", json.dumps(state, indent=1))


def _put(work: Path, target: Path) -> None:
    """Rename a finished folder; one that has its name is set aside until then, and deleted last."""
    aside = target.with_name(f"{ASIDE}{target.name}")
    if (target / "state.json").is_file():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(target, aside)
    elif target.exists():
        shutil.rmtree(target)
    os.replace(work, target)
    shutil.rmtree(aside, ignore_errors=True)


def _take_back(folder: Path) -> None:
    """Give what an interruption has left set aside its name again, unless its successor has it."""
    for aside in folder.glob(f"{ASIDE}*"):
        target = folder / aside.name.removeprefix(ASIDE)
        if (target / "state.json").is_file():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(OSError):  # another process was faster
                os.replace(aside, target)


def _optimizer_state(checkpoint: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(checkpoint / "optimizer.pt", weights_only=True, map_location="cpu"))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise PitError(
            f"the checkpoint {checkpoint} has a damaged optimizer.pt; delete this folder."
        ) from error


def _state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise PitError(f"the checkpoint {checkpoint} is damaged ({error}); delete this folder.") from error
    return dict(state)


# Settings that may change between a run and its continuation without changing what is learned.
_FREE = {"steps", "save_every", "keep", "log_every", "workers", "accumulate"}


def _refuse_other_settings(newest: Path, was: dict[str, Any], config: LoopConfig) -> None:
    # The cosine is stretched over the steps, so there they are no free choice.
    free = _FREE if config.schedule == "constant" else _FREE - {"steps"}
    now = json.loads(json.dumps(asdict(config)))
    changed = [f"{k} {was.get(k)} -> {v}" for k, v in now.items() if k not in free and was.get(k) != v]
    if changed:
        raise PitError(
            f"the checkpoint {newest} was made with other settings ({', '.join(changed)}); use them again, "
            "or another folder."
        )


def _load(
    newest: Path,
    named: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Any,
    scaler: Any,
    config: LoopConfig,
) -> int:
    state = _state(newest)
    _refuse_other_settings(newest, state["config"], config)
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    tensors, _ = load_tensors(newest / "model.safetensors")
    averages, _ = load_tensors(newest / "ema.safetensors")
    for loaded in (tensors, averages):
        check_shapes(shapes, loaded, f"the checkpoint {newest}, held against this model,")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
    ema.shadow_params = [averages[name].clone() for name in named]
    ema.optimization_step = state["ema_steps"]
    optimizer.load_state_dict(_optimizer_state(newest))
    if scaler is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _log(out: Path, step: int, values: dict[str, float]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, **{k: round(float(v), 6) for k, v in values.items()}}) + "\n")
