"""The IP-Prior's training objective."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pit_core.errors import PitError
from pit_core.flow import interpolate
from pit_core.ip_prior.checkpoint import load_prior
from pit_core.ip_prior.info import PriorInfo
from pit_core.ip_prior.model import IPPrior, init_for_training
from pit_core.ip_prior.sample import sample_prior
from pit_core.train.ip_prior import IPPriorObjective
from pit_core.train.loop import Draws, Item, LoopConfig, train

TOKENS, DIM, SLOTS, ROWS = 4, 6, 3, 4


def small_prior() -> IPPrior:
    prior = IPPrior(embedding_dim=DIM, hidden_dim=32, n_layers=2, n_heads=2, num_tokens=TOKENS)
    return init_for_training(prior, torch.Generator().manual_seed(0))


def batch(rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "target": torch.randn(rows, TOKENS, DIM, generator=generator),
        "cond": torch.randn(rows, TOKENS * SLOTS, DIM, generator=generator),
    }


def draws(step: int = 0, rows: int = ROWS) -> Draws:
    return Draws(seed=0, step=step, rows=slice(0, rows), total=rows)


class Seen(IPPriorObjective):
    """Keeps what the prior was given."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.given: list[tuple[Tensor, Tensor, Tensor]] = []
        self.prior.register_forward_pre_hook(lambda module, given: self.given.append(given))


class Examples:
    def __init__(self, rows: int = ROWS) -> None:
        self.all = batch(rows)

    def __len__(self) -> int:
        return len(self.all["target"])

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        rows = [index for _, index in items]
        return {name: values[rows] for name, values in self.all.items()}


def test_asks_for_the_velocity_at_points_on_the_line_to_noise() -> None:
    objective, data = Seen(small_prior(), prefix=0.0), batch()
    loss = objective(data, draws())["loss"]
    ((x, t, cond),) = objective.given
    assert t.shape == (ROWS,) and t.min() > 0 and t.max() < 1
    noise = (x - (1 - t[:, None, None]) * data["target"]) / t[:, None, None]
    torch.testing.assert_close(x, interpolate(data["target"], noise, t))
    # Fresh weights predict 0, so the loss is the mean square of noise - target.
    torch.testing.assert_close(loss, (noise - data["target"]).square().mean(), rtol=1e-4, atol=1e-5)
    assert torch.equal(cond, data["cond"])


def test_training_times_follow_the_logistic_of_a_normal() -> None:
    objective = Seen(small_prior())
    objective(batch(512), draws(rows=512))
    t = objective.given[0][1]
    assert abs(float(t.logit().mean())) < 0.15
    assert abs(float(t.logit().std()) - 1) < 0.1


def test_half_of_the_batches_see_a_random_prefix_of_whole_slots() -> None:
    objective, data = Seen(small_prior()), batch()
    for step in range(300):
        with torch.no_grad():
            objective(data, draws(step))
    lengths = [cond.shape[1] for _, _, cond in objective.given]
    counts = {slots: lengths.count(slots * TOKENS) for slots in (1, 2, 3)}
    assert sum(counts.values()) == 300
    # A third of the shortened ones keep every slot.
    assert counts[1] == pytest.approx(50, abs=20) and counts[2] == pytest.approx(50, abs=20)
    assert all(torch.equal(cond, data["cond"][:, : cond.shape[1]]) for _, _, cond in objective.given)


def test_every_process_keeps_the_same_prefix() -> None:
    objective, data = Seen(small_prior()), batch()
    halves = {name: values[:2] for name, values in data.items()}
    for step in range(10):
        for rows in (slice(0, 2), slice(2, 4)):
            objective(halves, Draws(seed=0, step=step, rows=rows, total=4))
    lengths = [cond.shape[1] for _, _, cond in objective.given]
    assert lengths[::2] == lengths[1::2]
    assert len(set(lengths)) > 1


def test_dropped_conditions_become_white_in_every_slot() -> None:
    white = torch.full((TOKENS, DIM), 7.0)
    objective = Seen(small_prior(), prefix=0.0, cond_dropout=0.25, white=white)
    data = batch(400)
    objective(data, draws(rows=400))
    cond = objective.given[0][2]
    dropped = (cond == 7.0).flatten(1).all(1)
    assert int(dropped.sum()) == pytest.approx(100, abs=30)
    assert torch.equal(cond[~dropped], data["cond"][~dropped])


def test_the_white_tokens_are_no_part_of_the_prior() -> None:
    objective = IPPriorObjective(small_prior(), cond_dropout=0.1, white=torch.zeros(TOKENS, DIM))
    assert all(name.startswith("prior.") for name in objective.state_dict())
    assert all(p.requires_grad for p in objective.parameters())


def test_learns_four_examples_and_gives_them_back(tmp_path: Path) -> None:
    objective, data = IPPriorObjective(small_prior()), Examples()
    config = LoopConfig(steps=300, batch_size=16, lr=4e-3, schedule="cosine", save_every=1000, ema_decay=0.95)
    with torch.no_grad():
        before = float(objective(data.all, draws())["loss"])
    result = train(objective, data, config, tmp_path, quiet=True)
    assert result.losses["loss"] < 0.5 * before
    sampled = sample_prior(objective.prior, data.all["cond"], guidance=1.0, seeds=[0, 1, 2, 3])
    error = (sampled - data.all["target"]).square().mean()
    others = (sampled - data.all["target"].roll(1, 0)).square().mean()
    assert error < 0.25 * others


def test_saves_a_prior_that_loads_again(tmp_path: Path) -> None:
    objective = IPPriorObjective(small_prior())
    info = PriorInfo(objective.prior.config, use_ref=True, max_crops=2)
    written = objective.save(tmp_path / "prior.safetensors", info, {"steps": 5})
    prior, loaded = load_prior(tmp_path / "prior.safetensors")
    assert (loaded.use_ref, loaded.max_crops, loaded.config) == (True, 2, objective.prior.config)
    assert loaded.content_hash == written.content_hash
    own = objective.prior.state_dict()
    assert all(torch.equal(own[key], value) for key, value in prior.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": torch.zeros(2, TOKENS, DIM + 1)}, r"target \(B, 4, 6\)"),
        ({"cond": torch.zeros(2, TOKENS + 1, DIM)}, r"got \(2, 4, 6\) and \(2, 5, 6\)"),
        ({"cond": torch.zeros(2, 0, DIM)}, r"got \(2, 4, 6\) and \(2, 0, 6\)"),
    ],
)
def test_refuses_batches_of_another_shape(change: dict[str, Tensor], said: str) -> None:
    with pytest.raises(PitError, match=said):
        IPPriorObjective(small_prior())(batch(2) | change, draws(rows=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prefix": 1.5}, "prefix"),
        ({"cond_dropout": 0.1}, "white"),
        ({"cond_dropout": -1.0}, "cond_dropout"),
        ({"white": torch.zeros(3, DIM)}, "white tokens"),
    ],
)
def test_refuses_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(PitError, match=said):
        IPPriorObjective(small_prior(), **settings)
