"""The training loop: what it promises about resuming, several processes, interruption and bad numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pit_core.errors import PitError
from pit_core.files import load_tensors
from pit_core.train import loop
from pit_core.train.loop import (
    Draws,
    Item,
    LoopConfig,
    Objective,
    Result,
    _item,
    latest_checkpoint,
    load_average,
    train,
)

CONFIG = LoopConfig(steps=6, batch_size=4, lr=1e-2, save_every=100, warmup=2, ema_decay=0.9, log_every=1)


class Numbers:
    """Ten examples; each batch depends on epoch and index alone."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        rows = [torch.randn(3, generator=torch.Generator().manual_seed(e * 1000 + i)) for e, i in items]
        return {"x": torch.stack(rows)}


class Regression(Objective):
    """A small network that denoises, beside a frozen one; `disturb` is called with the count of forwards."""

    def __init__(self, disturb: Callable[[int], float] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 3))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.disturb, self.forwards = disturb, 0

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
        factor = self.disturb(self.forwards) if self.disturb else 1.0
        self.forwards += 1
        scale = 1 + (draws.common() < 0.5)
        noisy = batch["x"] + draws.randn(3) * draws.rand(1) * scale
        kept = (draws.randint(10, 1) > 0).float()
        loss = (self.net(noisy * kept) - self.frozen(batch["x"])).square().mean()
        return {"loss": loss * factor, "twice": loss * 2}


def run(out: Path, config: LoopConfig = CONFIG, **more: Any) -> tuple[Regression, Result]:
    objective = Regression(more.pop("disturb", None))
    return objective, train(objective, more.pop("data", Numbers()), config, out, quiet=True, **more)


def interrupt_at(forward: int) -> Callable[[int], float]:
    def disturb(count: int) -> float:
        if count == forward:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    return disturb


def saved(out: Path) -> dict[str, Tensor]:
    """Weights, averages and optimizer state of the newest checkpoint, flat."""
    newest = latest_checkpoint(out)
    assert newest is not None
    found = {f"model.{k}": v for k, v in load_tensors(newest / "model.safetensors")[0].items()}
    found |= {f"ema.{k}": v for k, v in load_tensors(newest / "ema.safetensors")[0].items()}
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
    for number, state in optimizer["state"].items():
        found |= {f"optimizer.{number}.{k}": torch.as_tensor(v) for k, v in state.items()}
    return found


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, accumulate=2),
        replace(CONFIG, precision="bf16", accumulate=2),
        replace(CONFIG, schedule="cosine", workers=1),
    ],
    ids=["plain", "accumulate", "bf16", "worker"],
)
def test_resumes_exactly_after_an_interruption_at_any_step(tmp_path: Path, config: LoopConfig) -> None:
    straight, _ = run(tmp_path / "straight", config)
    stops = range(1, config.steps) if config == CONFIG else (3,)
    for stop in stops:
        out = tmp_path / f"stop-{stop}"
        _, broken = run(out, config, disturb=interrupt_at((stop - 1) * config.accumulate))
        assert (broken.step, broken.finished) == (stop, False)
        resumed, result = run(out, config)
        assert (result.step, result.finished) == (config.steps, True)
        assert largest_difference(saved(tmp_path / "straight"), saved(out)) == 0
        assert largest_difference(straight.state_dict(), resumed.state_dict()) == 0
        assert log(out)[-1]["loss"] == log(tmp_path / "straight")[-1]["loss"]


def test_resumes_exactly_from_an_older_checkpoint_after_a_kill(tmp_path: Path) -> None:
    run(tmp_path / "straight")

    def kill(count: int) -> float:
        if count == 5:
            raise RuntimeError("power cut")
        return 1.0

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", replace(CONFIG, save_every=2), disturb=kill)
    assert load_average(tmp_path / "cut")[0] == 4
    run(tmp_path / "cut", replace(CONFIG, save_every=2))
    assert largest_difference(saved(tmp_path / "straight"), saved(tmp_path / "cut")) == 0


def test_accumulation_gives_the_weights_of_one_large_batch(tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "four", replace(CONFIG, accumulate=4))
    assert largest_difference(saved(tmp_path / "one"), saved(tmp_path / "four")) < 1e-6


def _in_each_process(folder: Path) -> None:
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # the fork has inherited a single-process state
    rank = torch.distributed.get_rank()
    _, result = run(folder / "two")
    report = {"processes": PartialState().num_processes, "loss": result.losses["loss"]}
    # Only one process is told to stop: both must.
    _, stopped = run(folder / "stopped", disturb=interrupt_at(2) if rank == 1 else None)
    report["stopped_at"] = stopped.step
    with pytest.raises(PitError, match="loss became nan"):
        run(folder / "nan", disturb=(lambda count: math.nan) if rank == 1 else None)
    with pytest.raises(PitError, match="does not divide"):
        run(folder / "odd", replace(CONFIG, batch_size=3))
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_give_the_loss_and_the_weights_of_one(tmp_path: Path) -> None:
    from accelerate import debug_launcher

    _, result = run(tmp_path / "one")
    debug_launcher(_in_each_process, args=(tmp_path,), num_processes=2)
    reports = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [report["processes"] for report in reports] == [2, 2]
    for report in reports:
        assert report["loss"] == pytest.approx(result.losses["loss"], abs=1e-6)
        assert report["stopped_at"] == 3
    pairs = zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], abs=2e-6) for a, b in pairs)
    weights = [saved(tmp_path / name) for name in ("one", "two")]
    assert largest_difference(*weights) < 1e-6
    assert latest_checkpoint(tmp_path / "nan") is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_saves_nothing(tmp_path: Path, bad: float) -> None:
    config = replace(CONFIG, save_every=1)
    with pytest.raises(PitError, match=f"loss became {bad} at step 2; nothing was saved"):
        run(tmp_path, config, disturb=lambda count: bad if count == 2 else 1.0)
    assert load_average(tmp_path)[0] == 2
    assert all(torch.isfinite(tensor).all() for tensor in saved(tmp_path).values())


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    class Root(Regression):
        """The derivative of a root at zero: the loss is finite, its gradient is not."""

        def forward(self, batch: dict[str, Tensor], draws: Draws) -> dict[str, Tensor]:
            return {"loss": (self.net[0].weight * 0).sum().sqrt() + self.net(batch["x"]).mean()}

    objective = Root()
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    with pytest.raises(PitError, match="gradient's norm became nan at step 0"):
        train(objective, Numbers(), CONFIG, tmp_path, quiet=True)
    assert latest_checkpoint(tmp_path) is None
    assert largest_difference(before, objective.state_dict()) == 0


def test_ctrl_c_saves_and_gives_the_handler_back(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    objective, result = run(tmp_path, disturb=interrupt_at(1))
    assert (result.step, result.finished) == (2, False)
    step, averages = load_average(tmp_path)
    assert step == 2
    assert largest_difference(averages, {k: objective.state_dict()[k] for k in averages}) == 0
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice(count: int) -> float:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, disturb=twice)
    assert latest_checkpoint(tmp_path) is None


def test_stops_when_its_time_is_over(tmp_path: Path) -> None:
    _, result = run(tmp_path, max_seconds=0.0)
    assert (result.step, result.finished) == (1, False)
    assert load_average(tmp_path)[0] == 1


def test_trains_and_saves_only_what_requires_a_gradient(tmp_path: Path) -> None:
    before = Regression().state_dict()
    objective, _ = run(tmp_path)
    after = objective.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("net")} == set(load_average(tmp_path)[1])


def test_an_unfinished_checkpoint_folder_is_ignored_and_does_not_crowd_out_a_good_one(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, steps=2, keep=1))
    folder = tmp_path / "checkpoints"
    (folder / "step-00000009").mkdir()
    (folder / "step-00000009" / "model.safetensors").write_bytes(b"half")
    (folder / ".writing-00000009").mkdir()
    assert latest_checkpoint(tmp_path) == folder / "step-00000002"
    _, result = run(tmp_path, replace(CONFIG, keep=1))
    assert result.step == 6
    assert latest_checkpoint(tmp_path) == folder / "step-00000006"
    assert not (folder / "step-00000002").exists()
    assert not (folder / ".writing-00000009").exists()


class Killed(BaseException):
    """As the power goes: nothing after it runs."""


@pytest.mark.parametrize("changes", range(5))
def test_a_checkpoint_that_is_replaced_is_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: int
) -> None:
    """The process is killed after so many changes to the disk; there are four."""
    run(tmp_path, replace(CONFIG, steps=2))
    target = latest_checkpoint(tmp_path)
    assert target is not None
    before = saved(tmp_path)
    work = target.with_name(".writing-00000002")
    shutil.copytree(target, work)
    left = iter([True] * changes)

    def unless_killed(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> None:
            if not next(left, False):
                raise Killed
            change(*arguments, **options)

        return changed

    with monkeypatch.context() as patch:
        patch.setattr(loop.os, "replace", unless_killed(os.replace))
        patch.setattr(loop.shutil, "rmtree", unless_killed(shutil.rmtree))
        with suppress(Killed):
            loop._put(work, target)
    assert latest_checkpoint(tmp_path) == target
    assert largest_difference(before, saved(tmp_path)) == 0
    assert {path.name for path in target.parent.iterdir()} <= {target.name, work.name}
    assert run(tmp_path)[1].step == 6


def test_keeps_the_newest_checkpoints_only(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, save_every=1, keep=2))
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    before = saved(tmp_path)
    again, result = run(tmp_path)
    assert result.finished and again.forwards == 0
    assert largest_difference(before, saved(tmp_path)) == 0
    assert largest_difference(first.state_dict(), again.state_dict()) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 1e-3}, "lr 0.01 -> 0.001"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"batch_size": 2}, "batch_size 4 -> 2"),
    ],
)
def test_refuses_to_go_on_with_other_settings(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    run(tmp_path, replace(CONFIG, steps=1))
    with pytest.raises(PitError, match=named):
        run(tmp_path, replace(CONFIG, **change))


def test_more_steps_are_welcome_unless_the_schedule_is_stretched_over_them(tmp_path: Path) -> None:
    run(tmp_path / "constant", replace(CONFIG, steps=2))
    assert run(tmp_path / "constant")[1].step == 6
    run(tmp_path / "cosine", replace(CONFIG, steps=2, schedule="cosine"))
    with pytest.raises(PitError, match="steps 2 -> 6"):
        run(tmp_path / "cosine", replace(CONFIG, schedule="cosine"))


def test_refuses_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, steps=1))
    other = Regression()
    other.net[0] = nn.Linear(3, 8, bias=False)
    with pytest.raises(PitError, match=r"unexpected: net\.0\.bias"):
        train(other, Numbers(), CONFIG, tmp_path, quiet=True)
    narrow = Regression()
    narrow.net[2] = nn.Linear(8, 1)
    with pytest.raises(PitError, match=r"net\.2\.weight is \(3, 8\) instead of \(1, 8\)"):
        train(narrow, Numbers(), CONFIG, tmp_path, quiet=True)


def test_names_a_damaged_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, replace(CONFIG, steps=1))
    (tmp_path / "checkpoints" / "step-00000001" / "state.json").write_text('{"step": ')
    with pytest.raises(PitError, match=r"step-00000001 is damaged"):
        run(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 200])
def test_names_a_damaged_optimizer_file(tmp_path: Path, keep: int) -> None:
    run(tmp_path, replace(CONFIG, steps=1))
    path = tmp_path / "checkpoints" / "step-00000001" / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PitError, match=r"step-00000001 has a damaged optimizer\.pt"):
        run(tmp_path)


def test_refuses_a_batch_that_does_not_divide_and_an_empty_set(tmp_path: Path) -> None:
    with pytest.raises(
        PitError, match="batch_size 4 does not divide into 3 accumulation steps on 1 processes"
    ):
        run(tmp_path, replace(CONFIG, accumulate=3))
    with pytest.raises(PitError, match="training set is empty"):
        run(tmp_path, data=Numbers(0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"schedule": "linear"},
        {"precision": "fp8"},
        {"lr": math.nan},
        {"ema_decay": 1},
        {"warmup": -3},
        {"final_lr": -0.1},
        {"weight_decay": -1.0},
        {"grad_clip": -1.0},
        {"seed": -1},
        {"workers": -1},
        {"betas": (1.5, 0.9)},
        {"betas": (0.9,)},
    ],
)
def test_refuses_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(PitError, match=next(iter(wrong))):
        replace(CONFIG, **wrong)


def test_validates_with_the_averaged_weights_and_puts_the_others_back(tmp_path: Path) -> None:
    objective, seen = Regression(), []

    def validate(step: int) -> dict[str, float]:
        seen.append((step, objective.net[0].weight.detach().clone(), objective.training))
        return {"score": 1.0}

    train(objective, Numbers(), replace(CONFIG, save_every=3), tmp_path, validate=validate, quiet=True)
    assert [step for step, _, _ in seen] == [3, 6]
    assert not any(training for _, _, training in seen)
    assert torch.equal(seen[-1][1], load_average(tmp_path)[1]["net.0.weight"])
    run(tmp_path / "without")
    assert largest_difference(saved(tmp_path), saved(tmp_path / "without")) == 0
    assert log(tmp_path)[-1]["score"] == 1.0


def test_a_validation_that_fails_costs_no_steps(tmp_path: Path) -> None:
    def validate(step: int) -> dict[str, float]:
        raise torch.OutOfMemoryError("too large a preview")

    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, replace(CONFIG, save_every=3), validate=validate)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000003"
    run(tmp_path, replace(CONFIG, save_every=3))
    run(tmp_path / "without")
    assert largest_difference(saved(tmp_path), saved(tmp_path / "without")) == 0


class Signs(Numbers):
    """Numbers of which a whole step has the sign that its first index decides on."""

    def of_step(self, first: Item) -> Numbers:
        signed = Numbers(self.length)
        sign = 1.0 if first[1] % 2 else -1.0
        signed.fetch = lambda items: {"x": sign * self.fetch(items)["x"].abs()}  # type: ignore[method-assign]
        return signed


def test_what_a_step_has_in_common_does_not_depend_on_its_parts(tmp_path: Path) -> None:
    run(tmp_path / "whole", data=Signs())
    run(tmp_path / "parts", replace(CONFIG, accumulate=4), data=Signs())
    assert largest_difference(saved(tmp_path / "whole"), saved(tmp_path / "parts")) < 1e-6


def test_another_precision_may_follow_in_the_same_process(tmp_path: Path) -> None:
    objective = Regression()
    train(objective, Numbers(), replace(CONFIG, precision="bf16"), tmp_path / "bf16", quiet=True)
    seen: list[torch.dtype] = []
    objective.net[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    train(objective, Numbers(), CONFIG, tmp_path / "full", quiet=True)
    assert set(seen) == {torch.float32}


def test_every_epoch_sees_every_example_once() -> None:
    for seed in (0, 2**64 - 1):
        items = [_item(seed, position, 7) for position in range(21)]
        for epoch in range(3):
            assert sorted(index for e, index in items if e == epoch) == list(range(7))
        assert items[:7] != [(0, index) for _, index in items[7:14]]


def test_rows_draw_what_one_process_would_draw_for_them() -> None:
    whole = Draws(seed=2**64 - 1, step=5, rows=slice(0, 6), total=6)
    parts = [Draws(seed=2**64 - 1, step=5, rows=slice(a, a + 2), total=6) for a in (0, 2, 4)]
    for name, arguments in (("randn", (2, 3)), ("rand", (1,)), ("randint", (9, 2))):
        expected = getattr(whole, name)(*arguments)
        assert torch.equal(expected, torch.cat([getattr(part, name)(*arguments) for part in parts]))
    assert len({float(draws.common()) for draws in (whole, *parts)}) == 1
    other = Draws(seed=2**64 - 1, step=6, rows=slice(0, 6), total=6)
    assert not torch.equal(other.randn(2), Draws(2**64 - 1, 5, slice(0, 6), 6).randn(2))


def test_the_learning_rate_warms_up_and_falls() -> None:
    config = replace(CONFIG, steps=12, warmup=2, schedule="cosine", final_lr=0.1)
    rates = [config.lr_at(step) for step in range(13)]
    assert rates[0] == pytest.approx(0.5e-2) and rates[2] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3)
    assert all(a > b for a, b in pairwise(rates[2:]))
