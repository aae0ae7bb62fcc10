"""Fully sharded training on two CPU processes, as the shipped settings say: it is the training of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from pit_core.errors import PitError
from pit_core.files import load_tensors
from pit_core.parts.augment import Augment
from pit_core.parts.shards import Index, write_index, write_shard, write_white
from pit_core.train import fsdp
from pit_core.train.ip_prior_run import run
from pit_core.train.loop import latest_checkpoint
from pit_core.train.plot import read_log

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="needs fork")]

TOKENS, WIDTH = 4, 12


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty wholes with two parts each, as `pit data embed` would have left them; their tokens are noise."""
    folder, chance = tmp_path_factory.mktemp("tokens"), torch.Generator().manual_seed(0)
    shapes = {"target": (TOKENS, WIDTH), "parts": (2, 1, TOKENS, WIDTH)}
    wholes = [{k: torch.randn(shape, generator=chance) for k, shape in shapes.items()} for _ in range(20)]
    write_shard(folder / "shards" / "0.tar", wholes)
    write_white(folder, "key", torch.randn(TOKENS, WIDTH, generator=chance))
    write_index(folder, Index("key", (("shards/0.tar", 20),), TOKENS, WIDTH, 1, Augment(max_crops=2)))
    return folder


def settings(embedded: Path, out: Path, **train: Any) -> Path:
    plain = {"steps": 3, "batch_size": 4, "lr": 1e-3, "log_every": 1, "save_every": 10, "ema_decay": 0.5}
    values = {
        "tokens": str(embedded),
        "out": str(out),
        "prior": {"hidden_dim": 32, "num_layers": 2, "num_attention_heads": 4},
        "validation": {"wholes": 2, "bins": 2},
        "train": plain | train,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{len(list(out.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def environment(config: Path) -> dict[str, str]:
    """What `accelerate launch` tells its processes of FSDP, by its own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    checked, _, _ = _validate_launch_command(arguments)
    assert checked.use_fsdp and not checked.cpu  # else it starts one process only
    told = prepare_multi_gpu_env(checked)
    return {name: value for name, value in told.items() if "FSDP" in name}


def _in_each_process(configs: list[Path], report: Path) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the fork has inherited a single-process state
    seen: list[float] = []
    spread = fsdp.spread

    def watched(*arguments: Any) -> Any:
        model = spread(*arguments)
        of_all = sum(p.numel() for p in model.parameters())
        seen.append(sum(p.to_local().numel() for p in model.parameters()) / of_all)
        return model

    fsdp.spread = watched  # how much of the model this process holds
    for config in configs:
        run(config, quiet=True)
    rank = torch.distributed.get_rank()
    (report / f"rank-{rank}.json").write_text(json.dumps(seen))


def published(out: Path) -> dict[str, Tensor]:
    return load_tensors(out / "ip_prior.safetensors")[0]


def saved(out: Path) -> dict[str, Tensor]:
    """Everything that the newest checkpoint holds."""
    newest = latest_checkpoint(out)
    assert newest is not None
    found = {
        f"{name}.{k}": v for name in ("model", "ema") for k, v in _tensors(newest / f"{name}.safetensors")
    }
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
    for number, state in optimizer["state"].items():
        found |= {f"{number}.{name}": value for name, value in state.items()}
    return found


def _tensors(path: Path) -> list[tuple[str, Tensor]]:
    return list(load_tensors(path)[0].items())


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.timeout(300)
def test_sharded_over_two_processes_it_is_the_training_of_one(
    tokens: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import debug_launcher

    run(settings(tokens, tmp_path / "one"), quiet=True)
    run(settings(tokens, tmp_path / "begun by one", steps=1), quiet=True)
    configs = [
        settings(tokens, tmp_path / "straight"),
        settings(tokens, tmp_path / "accumulating", accumulate=2),
        settings(tokens, tmp_path / "begun by one"),
        *(settings(tokens, tmp_path / "resumed", steps=steps) for steps in (1, 2, 3)),
    ]
    for name, value in environment(root / "docs" / "configs" / "fsdp_cpu.yaml").items():
        monkeypatch.setenv(name, value)
    debug_launcher(_in_each_process, args=(configs, tmp_path), num_processes=2)
    for rank in (0, 1):
        held = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert held == pytest.approx([0.5] * len(configs), abs=0.01)

    assert largest_difference(saved(tmp_path / "straight"), saved(tmp_path / "resumed")) == 0
    for place in ("straight", "accumulating", "begun by one"):
        for name in ("loss", "val"):
            expected = dict(read_log(tmp_path / "one" / "log.jsonl", name))
            found = dict(read_log(tmp_path / place / "log.jsonl", name))
            assert [found[step] for step in expected] == pytest.approx(list(expected.values()), abs=2e-5)
        # AdamW enlarges rounding.
        assert largest_difference(published(tmp_path / "one"), published(tmp_path / place)) < 2e-4
        assert largest_difference(saved(tmp_path / "one"), saved(tmp_path / place)) < 2e-4
    monkeypatch.delenv(fsdp.SWITCH)  # what they have saved, one process goes on with
    assert run(settings(tokens, tmp_path / "resumed", steps=4), quiet=True).step == 4


@pytest.mark.parametrize("name", ["fsdp.yaml", "fsdp_cpu.yaml"])
def test_the_shipped_settings_switch_it_on(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = environment(root / "docs" / "configs" / name)
    assert not fsdp.wanted("bf16")
    for variable, value in told.items():
        monkeypatch.setenv(variable, value)
    assert fsdp.wanted("bf16")
    with fsdp.kept_from_accelerate():
        assert not fsdp.wanted("bf16")
    assert fsdp.wanted("no")


@pytest.mark.parametrize(
    ("change", "precision", "said"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "no", "fsdp_offload_params"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "no", "gradient_checkpointing: true"),
        ({}, "fp16", "bf16"),
    ],
)
def test_refuses_what_it_cannot_follow(
    change: dict[str, str], precision: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {fsdp.SWITCH: "true", **change}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PitError, match=said):
        fsdp.wanted(precision)
