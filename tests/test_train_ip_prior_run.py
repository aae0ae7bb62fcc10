"""`pit train ip-prior` on embedded part data: whole runs at toy size, in one process and in two."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_parts
import torch
import yaml
from PIL import Image
from torch import Tensor

from pit_core.errors import PitError
from pit_core.files import load_tensors
from pit_core.ip_prior.checkpoint import load_prior
from pit_core.ip_prior.model import IPPrior, init_for_training
from pit_core.parts.augment import Augment
from pit_core.parts.embed import Encoder, embed
from pit_core.parts.token_data import TokenData, split_rows
from pit_core.parts.views import Recipe
from pit_core.train.config import from_mapping
from pit_core.train.events import EventLog
from pit_core.train.ip_prior_check import flow_losses
from pit_core.train.ip_prior_run import PriorSettings, PriorSizes, Validation, run
from pit_core.train.plot import read_log

AUGMENT = Augment(max_crops=2, sketch_prob=0.0, use_ref=True)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty wholes, two of which are held out."""
    folder = tmp_path_factory.mktemp("data")
    manifest = tiny_parts.write_set(folder / "set", 20)
    encode = Encoder(tiny_parts.image_encoder(), tiny_parts.adapter())
    recipe = Recipe(tiny_parts.PIXELS, AUGMENT, views=2)
    embed(manifest, folder / "tokens", encode, recipe, shard_size=8, quiet=True)
    return folder / "tokens"


def settings(embedded: Path, out: Path, /, **changes: Any) -> Path:
    train = {"steps": 4, "batch_size": 4, "lr": 1e-3, "log_every": 1, "save_every": 3, "ema_decay": 0.5}
    values: dict[str, Any] = {
        "tokens": str(embedded),
        "out": str(out),
        "prior": {"hidden_dim": 32, "num_layers": 2, "num_attention_heads": 4},
        "validation": {"wholes": 2, "bins": 2},
        "train": train | changes.pop("train", {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(values | changes))
    return out / "config.yaml"


def published(out: Path) -> dict[str, Tensor]:
    return load_tensors(out / "ip_prior.safetensors")[0]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_run_ends_in_a_prior_that_says_how_it_was_trained(tokens: Path, tmp_path: Path) -> None:
    result = run(settings(tokens, tmp_path), quiet=True)
    assert (result.step, result.finished) == (4, True)
    prior, info = load_prior(tmp_path / "ip_prior.safetensors")
    assert prior.config.to_dict() == {
        "embedding_dim": tiny_parts.WIDTH,
        "hidden_dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "num_tokens": tiny_parts.TOKENS,
        "qk_norm": True,
    }
    assert (info.use_ref, info.max_crops, info.sketch_prob, info.notes) == (True, 2, 0.0, ())
    metadata = load_tensors(tmp_path / "ip_prior.safetensors")[1]
    assert (metadata["steps"], metadata["seed"]) == ("4", "0")
    assert [step for step, _ in read_log(tmp_path / "log.jsonl", "val_0.75")] == [3, 4]
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == ["step-00000003", "step-00000004"]
    averages = load_tensors(tmp_path / "checkpoints" / "step-00000004" / "ema.safetensors")[0]
    assert largest_difference({f"prior.{k}": v for k, v in published(tmp_path).items()}, averages) == 0
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size[0] > 500


def test_the_loss_on_wholes_held_out_falls(tokens: Path, tmp_path: Path) -> None:
    changes = {"steps": 60, "lr": 4e-3, "save_every": 30, "warmup": 5, "schedule": "cosine"}
    run(settings(tokens, tmp_path, train=changes), quiet=True)
    fresh = init_for_training(IPPrior(tiny_parts.WIDTH, 32, 2, 4, tiny_parts.TOKENS))
    held_out = TokenData(tokens, rows=split_rows(20, 2)[1])
    before = flow_losses(fresh, held_out, bins=2)["val"]
    after = [value for _, value in read_log(tmp_path / "log.jsonl", "val")]
    assert after[1] < after[0] < before


def test_an_interrupted_run_goes_on_to_the_same_weights(tokens: Path, tmp_path: Path) -> None:
    workers = {"workers": 1}
    run(settings(tokens, tmp_path / "whole", train=workers), quiet=True)
    run(settings(tokens, tmp_path / "parts", train=workers | {"steps": 1}), quiet=True)
    run(settings(tokens, tmp_path / "parts", train={"steps": 3}), quiet=True)
    run(settings(tokens, tmp_path / "parts"), quiet=True)
    assert largest_difference(published(tmp_path / "whole"), published(tmp_path / "parts")) == 0
    logs = [dict(read_log(tmp_path / name / "log.jsonl")) for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_accumulation_and_gradient_checkpointing_change_nothing(tokens: Path, tmp_path: Path) -> None:
    run(settings(tokens, tmp_path / "plain"), quiet=True)
    run(settings(tokens, tmp_path / "less", gradient_checkpointing=True), quiet=True)
    run(settings(tokens, tmp_path / "slow", train={"accumulate": 2}), quiet=True)
    plain = published(tmp_path / "plain")
    assert largest_difference(plain, published(tmp_path / "less")) < 1e-6
    assert largest_difference(plain, published(tmp_path / "slow")) < 2e-4  # AdamW enlarges rounding


def test_bf16_and_a_start_from_another_prior(tokens: Path, tmp_path: Path) -> None:
    run(settings(tokens, tmp_path / "a"), quiet=True)
    start = str(tmp_path / "a" / "ip_prior.safetensors")
    run(settings(tokens, tmp_path / "b", start=start, prior={}, train={"precision": "bf16"}), quiet=True)
    change = largest_difference(published(tmp_path / "a"), published(tmp_path / "b"))
    assert 0 < change < 0.02
    assert load_prior(tmp_path / "b" / "ip_prior.safetensors")[0].config.hidden_dim == 32


def _run_in_each_process(config: Path) -> None:
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # the fork has inherited a single-process state
    run(config, quiet=True)
    assert PartialState().num_processes == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_give_the_loss_and_the_prior_of_one(tokens: Path, tmp_path: Path) -> None:
    from accelerate import debug_launcher

    run(settings(tokens, tmp_path / "one"), quiet=True)
    debug_launcher(_run_in_each_process, args=(settings(tokens, tmp_path / "two"),), num_processes=2)
    for name in ("loss", "val"):
        one, two = (read_log(tmp_path / place / "log.jsonl", name) for place in ("one", "two"))
        assert [step for step, _ in one] == [step for step, _ in two]
        assert [value for _, value in one] == pytest.approx([value for _, value in two], abs=2e-5)
    assert largest_difference(published(tmp_path / "one"), published(tmp_path / "two")) < 2e-4


def test_refuses_to_go_on_with_other_data_or_another_model(tokens: Path, tmp_path: Path) -> None:
    run(settings(tokens, tmp_path), quiet=True)
    before = published(tmp_path)
    for changes, said in (
        ({"max_crops": 1}, "other choice"),
        ({"validation": {"wholes": 0}}, "other examples"),
        ({"validation": {"wholes": 2, "bins": 2, "seed": 1}}, "other held_out"),
        ({"prior": {"hidden_dim": 64, "num_layers": 1}}, "other prior"),
        ({"prefix": 0.0}, "other prefix"),
    ):
        with pytest.raises(PitError, match=said):
            run(settings(tokens, tmp_path, **changes), quiet=True)
    assert largest_difference(before, published(tmp_path)) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"token": "x"}, "did you mean 'tokens'"),
        ({"tokens": "absent"}, "finished `pit data embed`"),
        ({"validation": {"bins": 0}}, "1 bin"),
        ({"prior": {"hidden_dim": 33, "num_attention_heads": 2}}, "hidden_dim"),
        ({"prefix": 2.0}, "prefix"),
        ({"start": "absent.safetensors"}, "There is no file"),
        ({"train": {"batch_size": 3, "accumulate": 2}}, "does not divide"),
    ],
)
def test_refuses_wrong_settings_in_one_sentence(
    changes: dict[str, Any], said: str, tokens: Path, tmp_path: Path
) -> None:
    with pytest.raises(PitError, match=said) as error:
        run(settings(tokens, tmp_path, **changes), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ip_prior.safetensors").exists()


def test_a_start_for_another_adapter_is_refused(tokens: Path, tmp_path: Path) -> None:
    torch.save(IPPrior(8, 32, 1, 2, tiny_parts.TOKENS).state_dict(), tmp_path / "prior.ckpt")
    (tmp_path / "cfg.yaml").write_text("num_attention_heads: 2\nnum_tokens: 4\nuse_ref: false\n")
    with pytest.raises(PitError, match="4 tokens of width 8, but .* holds 4 of width 12"):
        run(settings(tokens, tmp_path / "out", start=str(tmp_path / "prior.ckpt")), quiet=True)


def test_a_start_with_other_slots_than_the_data_has_to_be_meant(tokens: Path, tmp_path: Path) -> None:
    prior = IPPrior(tiny_parts.WIDTH, 32, 1, 2, tiny_parts.TOKENS)
    torch.save(prior.state_dict(), tmp_path / "prior.ckpt")
    (tmp_path / "cfg.yaml").write_text("num_attention_heads: 2\nnum_tokens: 4\nmax_crops: 7\n")
    start = {"start": str(tmp_path / "prior.ckpt"), "prior": {}, "train": {"steps": 1}}
    with pytest.raises(
        PitError, match="'use_ref: false, max_crops: 7', but .* 'use_ref: true, max_crops: 2'"
    ):
        run(settings(tokens, tmp_path / "out", **start), quiet=True)
    with pytest.raises(PitError, match=r"'max_crops: 7', but .*; set max_crops in"):
        run(settings(tokens, tmp_path / "out", **start, use_ref=True), quiet=True)
    run(settings(tokens, tmp_path / "out", **start, use_ref=False, max_crops=7), quiet=True)
    info = load_prior(tmp_path / "out" / "ip_prior.safetensors")[1]
    assert (info.use_ref, info.max_crops) == (False, 7)


def test_what_is_not_set_is_taken_over_from_the_embedding(tmp_path: Path) -> None:
    train = {"steps": 1, "batch_size": 1}
    plain = from_mapping(
        {"tokens": "a", "out": "b", "train": train}, PriorSettings, where="x", folder=tmp_path
    )
    assert plain.choice(AUGMENT) == AUGMENT
    assert replace(plain, max_crops=5, use_ref=False).choice(AUGMENT) == replace(
        AUGMENT, max_crops=5, use_ref=False
    )


# the check


def test_fresh_weights_have_the_loss_of_no_guess_at_every_time(tokens: Path) -> None:
    fresh = init_for_training(IPPrior(tiny_parts.WIDTH, 32, 2, 4, tiny_parts.TOKENS))
    data = TokenData(tokens)
    losses = flow_losses(fresh, data, bins=4, seed=1)
    assert list(losses) == ["val", "val_0.125", "val_0.375", "val_0.625", "val_0.875"]
    assert len({round(value, 6) for value in losses.values()}) == 1  # the same noise at every time
    targets = data.fetch([(0, row) for row in range(20)])["target"].float()
    assert losses["val"] == pytest.approx(1 + float(targets.square().mean()), rel=0.2)
    assert flow_losses(fresh, data, bins=4, seed=1) == losses != flow_losses(fresh, data, bins=4, seed=2)


# events


def test_events_are_written_once_each_and_torn_lines_wait(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, events = tmp_path / "log.jsonl", tmp_path / "events"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "saved": 1.0, "val_0.5": 2.0}\n{"step": 3, "lo')
    EventLog(path, events).update()
    with path.open("a") as file:
        file.write('ss": 1.5}\n')
    EventLog(path, events).update()
    EventLog(path, events).update()
    found = EventAccumulator(str(events)).Reload()
    assert sorted(found.Tags()["scalars"]) == ["loss", "val/t0.5"]
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 3.0), (3, 1.5)]
    assert json.loads((events / "read.json").read_text())["bytes"] == path.stat().st_size


def test_the_example_settings_are_valid(root: Path) -> None:
    path = root / "docs" / "configs" / "ip_prior.yaml"
    values = yaml.safe_load(path.read_text())
    made = from_mapping(values, PriorSettings, where=path.name, folder=path.parent)
    assert made.prior == PriorSizes(num_attention_heads=32) and made.validation == Validation()
    assert made.train.schedule == "cosine" and made.train.batch_size == 64
