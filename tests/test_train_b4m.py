"""Training B4M: who learns from what, the two stages, and whole runs on a tiny SDXL."""

from __future__ import annotations

import copy
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_stack
import torch
import yaml
from lora_files import unet_shapes
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pit_core.b4m.factors import load_factors
from pit_core.b4m.merge import basis_difference, splice
from pit_core.b4m.projection import SplitAdapter
from pit_core.b4m.riemannian import RiemannianAdamW
from pit_core.cli import main
from pit_core.errors import PitError
from pit_core.files import load_tensors
from pit_core.lora.formats import kind_of, load_lora, match_report
from pit_core.train.b4m import B4MObjective
from pit_core.train.b4m_data import PictureFolder, Rows, read_folder
from pit_core.train.b4m_run import JoinSettings, SplitSettings, run
from pit_core.train.config import from_mapping, read_config
from pit_core.train.ip_adapter import add_noise, predict_noise
from pit_core.train.loop import Draws, Item, LoopConfig, train
from pit_core.train.plot import read_log

RANK = 4
LR, OTHER_LR = 1e-2, 1e-3
ALL = slice(0, 3)
ALPHAS = torch.linspace(0.99, 0.01, 10)


def objective_for(role: Any = "content", adapter: SplitAdapter | None = None, **options: Any) -> B4MObjective:
    unet = tiny_stack.unet()
    adapter = adapter or shaken(SplitAdapter.new(unet, RANK, seed=3))
    return B4MObjective(unet, adapter, role=role, alphas_cumprod=ALPHAS, **options)


def shaken(adapter: SplitAdapter) -> SplitAdapter:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in (*adapter.content, *adapter.style):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return adapter


def rows(count: int = 3, pictures: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    side = tiny_stack.PIXELS // 4
    return {
        "latents": torch.randn(count, pictures, 4, side, side, generator=generator),
        "text": torch.randn(count, pictures, 5, tiny_stack.CONTEXT, generator=generator),
        "pooled": torch.randn(count, pictures, tiny_stack.TEXT, generator=generator),
        "time_ids": torch.full((count, pictures, 6), 32.0),
    }


def other_pictures(values: dict[str, Tensor], column: slice) -> dict[str, Tensor]:
    """The same batch with other pictures in some columns."""
    changed = {name: value.clone() for name, value in values.items()}
    changed["latents"][:, column] += 1
    return changed


class Memory:
    """Rows in memory as a data set."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values["latents"])

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return {name: value[[index for _, index in items]] for name, value in self.values.items()}


def trained(values: dict[str, Tensor], out: Path, steps: int, **options: Any) -> SplitAdapter:
    objective = objective_for(other_lr_scale=OTHER_LR / LR, **options)
    config = LoopConfig(steps=steps, batch_size=3, lr=LR, ema_decay=0.0, save_every=1000, weight_decay=0.0)
    train(objective, Memory(values), config, out, quiet=True)
    return objective.adapter


# who learns from what


def test_each_side_s_loss_reaches_its_own_factor_alone() -> None:
    for role in ("content", "style"):
        for name, reached, spared in (("content", "content", "style"), ("style", "style", "content")):
            objective = objective_for(role)
            objective(rows(), Draws(0, 0, ALL, 3))[name].backward()
            adapter = objective.adapter
            assert all(p.grad is not None and p.grad.any() for p in getattr(adapter, reached))
            assert all(p.grad is None or not p.grad.any() for p in getattr(adapter, spared))
            assert all(p.grad is None for p in objective.unet.parameters())


def test_a_side_s_gradient_is_that_of_its_loss_alone_with_the_other_factor_held() -> None:
    objective = objective_for("content")
    objective(rows(), Draws(0, 0, ALL, 3))["loss"].backward()
    for place, factor in ((slice(0, 1), "content"), (slice(1, 3), "style")):
        alone = objective_for("entity")  # in which gradients go everywhere
        pictures = {name: value[:, place].flatten(0, 1) for name, value in rows().items()}
        draws = Draws(0, 0, ALL, 3)
        noise, t = draws.randn(*pictures["latents"].shape[1:]), draws.randint(10)
        repeats = pictures["latents"].shape[0] // 3
        noise, t = noise.repeat_interleave(repeats, 0), t.repeat_interleave(repeats)
        noisy = add_noise(pictures["latents"], noise, ALPHAS[t])
        loss = (predict_noise(alone.unet, noisy, t, pictures) - noise).pow(2).mean()
        expected = torch.autograd.grad(loss, getattr(alone.adapter, factor))
        for p, gradient in zip(getattr(objective.adapter, factor), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("role", ["content", "style"])
def test_a_loss_never_moves_the_other_side_s_factor(role: str, tmp_path: Path) -> None:
    """Whatever the content pictures are, the style factor takes the same step, bit for bit; and mirrored."""
    own, other = ("content", "style") if role == "content" else ("style", "content")
    values = rows()
    one, two = (
        trained(batch, tmp_path / str(number), steps=1, role=role)
        for number, batch in enumerate((values, other_pictures(values, slice(0, 1))))
    )
    assert all(torch.equal(a, b) for a, b in zip(getattr(one, other), getattr(two, other), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(getattr(one, own), getattr(two, own), strict=True))


def test_each_factor_moves_at_its_own_rate(tmp_path: Path) -> None:
    steps, start = 3, objective_for().adapter
    adapter = trained(rows(), tmp_path, steps=steps)
    for factor, lr in (("content", LR), ("style", OTHER_LR)):
        pairs = zip(getattr(adapter, factor), getattr(start, factor), strict=True)
        moved = [float((a - b).detach().abs().max()) for a, b in pairs]
        assert min(moved) > 0 and lr < max(moved) < 1.1 * steps * lr


def test_the_pictures_of_a_row_share_noise_and_step() -> None:
    values = rows(1, 1)
    twice = {name: value.repeat(1, 3, *[1] * (value.ndim - 2)) for name, value in values.items()}
    parts = objective_for()(twice, Draws(0, 0, slice(0, 1), 1))
    torch.testing.assert_close(parts["content"], parts["style"])


def test_an_interrupted_first_stage_goes_on_at_both_rates(tmp_path: Path) -> None:
    whole = trained(rows(), tmp_path / "whole", steps=2)
    trained(rows(), tmp_path / "parts", steps=1)
    parts = trained(rows(), tmp_path / "parts", steps=2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_frozen_halves_stay_bit_for_bit_also_under_weight_decay(tmp_path: Path) -> None:
    for role in ("content", "entity"):
        objective = objective_for(role)
        before = {name: b.clone() for name, b in objective.adapter.named_buffers()}
        config = LoopConfig(steps=2, batch_size=3, lr=LR, weight_decay=0.5, ema_decay=0.0)
        train(objective, Memory(rows()), config, tmp_path / role, quiet=True)
        after = dict(objective.adapter.named_buffers())
        assert before.keys() == after.keys() and len(before) == 2 * len(objective.adapter.projections)
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_together_both_losses_reach_both_factors_through_the_riemannian_step(tmp_path: Path) -> None:
    objective = objective_for("entity", damping=1e-2)
    assert isinstance(objective.optimizer(LoopConfig(1, 1)), RiemannianAdamW)
    expected = copy.deepcopy(objective)
    draws = Draws(0, 0, ALL, 3)
    for name in ("content", "style"):
        parts = expected(rows(), Draws(0, 0, ALL, 3))
        found = torch.autograd.grad(parts[name], [*expected.adapter.content, *expected.adapter.style])
        assert all(gradient.any() for gradient in found)
    expected(rows(), draws)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(expected.adapter.parameters(), 0.5)
    RiemannianAdamW(expected.adapter.pairs(), LR, 1e-2, 1e-2, relative=True).step()
    config = LoopConfig(steps=1, batch_size=3, lr=LR, grad_clip=0.5, ema_decay=0.0)
    train(objective, _InOrder(rows()), config, tmp_path, quiet=True)
    for one, two in zip(objective.adapter.parameters(), expected.adapter.parameters(), strict=True):
        torch.testing.assert_close(one, two)


class _InOrder(Memory):
    """As Memory, but in order, whatever the loop asks for."""

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        return self.values


def test_fsdp_is_refused_instead_of_losing_a_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for role in ("content", "entity"):
        with pytest.raises(PitError, match="its own optimizer, which FSDP cannot spread"):
            train(objective_for(role), Memory(rows()), LoopConfig(1, 3), tmp_path, quiet=True)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        objective = objective_for()
        if checkpointing:
            objective.unet.enable_gradient_checkpointing()
        objective.train_mode()
        objective(rows(), Draws(0, 0, ALL, 3))["loss"].backward()
        gradients.append([p.grad for p in objective.adapter.parameters()])
    for plain, checked in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checked)


def test_a_copy_learns_without_the_original() -> None:
    objective = objective_for()
    other = copy.deepcopy(objective)
    other(rows(), Draws(0, 0, ALL, 3))["loss"].backward()
    assert all(p.grad is not None for p in other.adapter.parameters())
    assert all(p.grad is None for p in objective.adapter.parameters())


def test_refuses_what_does_not_go_together() -> None:
    with pytest.raises(PitError, match="other_lr_scale must be zero or a positive number, got -1"):
        objective_for(other_lr_scale=-1)
    with pytest.raises(PitError, match="needs pictures of both sides, got one picture"):
        objective_for()(rows(3, 1), Draws(0, 0, ALL, 3))
    with pytest.raises(PitError, match="lacks pooled"):
        lacking = {name: value for name, value in rows().items() if name != "pooled"}
        objective_for()(lacking, Draws(0, 0, ALL, 3))


# data


def draw(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def test_a_prompt_is_fixed_or_takes_the_caption_beside_the_picture(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 1)
    draw(tmp_path / "b.png", 2)
    (tmp_path / "a.txt").write_text(" a  house\n")
    (tmp_path / "b.txt").write_text("a cat")
    fixed, _ = read_folder(PictureFolder(tmp_path, "a photo of snq toy"), tmp_path / "x.json", quiet=True)
    assert [picture.text for picture in fixed] == ["a photo of snq toy"] * 2
    style = PictureFolder(tmp_path, "{caption} in w@z art style")
    told, _ = read_folder(style, tmp_path / "x.json", quiet=True)
    assert [p.text for p in told] == ["a house in w@z art style", "a cat in w@z art style"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(PitError, match=r"needs a caption of 'b.png': write it into 'b.txt'"):
        read_folder(style, tmp_path / "x.json", quiet=True)
    with pytest.raises(PitError, match="There is no folder"):
        read_folder(PictureFolder(tmp_path / "none", "a"), tmp_path / "x.json", quiet=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PitError, match="holds no pictures"):
        read_folder(PictureFolder(tmp_path / "empty", "a"), tmp_path / "x.json", quiet=True)


def test_rows_pair_every_own_picture_with_one_of_each_other_set() -> None:
    def numbered(start: int, count: int) -> Memory:
        return Memory({"latents": torch.arange(start, start + count)})

    data = Rows(numbered(0, 4), [numbered(10, 3), numbered(20, 5)])
    items = [(epoch, index) for epoch in range(30) for index in range(4)]
    found = data.fetch(items)["latents"]
    assert len(data) == 4 and found.shape == (120, 3)
    assert found[:, 0].tolist() == [index for _, index in items]
    assert set(found[:, 1].tolist()) == {10, 11, 12} and set(found[:, 2].tolist()) == {20, 21, 22, 23, 24}
    assert torch.equal(data.fetch(items[7:9])["latents"], found[7:9])


# whole runs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL, and folders of pictures."""
    root = tmp_path_factory.mktemp("models")
    tiny_stack.save(root)
    for number, name in enumerate(("toy", "toy", "yarn", "yarn", "paper")):
        draw(root / name / f"{number}.png", number)
    draw(root / "toy" / "wide.png", 9, (60, 32))
    (root / "toy" / "torn.png").write_bytes(b"torn")
    return root


def settings(models: Path, out: Path, stage: str, /, **changes: Any) -> Path:
    toy = {"images": str(models / "toy"), "prompt": "a snq"}
    yarn = {"images": str(models / "yarn"), "prompt": "a in w"}
    paper = {"images": str(models / "paper"), "prompt": "a in p"}
    sides: dict[str, dict[str, Any]] = {
        "content": {"own": toy, "others": [yarn, paper], "rank": RANK, "other_lr": OTHER_LR},
        "style": {"own": yarn, "others": [toy], "rank": RANK, "other_lr": OTHER_LR},
        "join": {"content": toy, "style": yarn},
    }
    steps = {"steps": 3, "batch_size": 2, "lr": LR, "log_every": 1, "save_every": 2, "ema_decay": 0.5}
    values: dict[str, Any] = {
        "base": str(models / "sdxl"),
        "out": str(out),
        "resolution": tiny_stack.PIXELS,
        "cache": str(models / "cache"),
        "preview": {"count": 0},
        "train": steps | changes.pop("train", {}),
        **sides[stage],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(values | changes))
    return out / "config.yaml"


def joining(models: Path, content: Path, style: Path) -> dict[str, Any]:
    return {
        "content": {"images": str(models / "toy"), "prompt": "a snq", "lora": str(content)},
        "style": {"images": str(models / "yarn"), "prompt": "a in w", "lora": str(style)},
    }


@pytest.fixture(scope="module")
def parents(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A content and a style file."""
    root = tmp_path_factory.mktemp("parents")
    with pytest.warns(UserWarning, match="1 of 4 rows are left out"):
        for stage in ("content", "style"):
            run(settings(models, root / stage, stage), stage, quiet=True)
    return {stage: root / stage / f"b4m_{stage}.safetensors" for stage in ("content", "style")}


def test_the_first_stage_ends_in_files_of_one_basis_that_say_what_they_are(parents: dict[str, Path]) -> None:
    shapes = unet_shapes(tiny_stack.unet())
    for role, path in parents.items():
        lora = load_lora(path)
        assert match_report(lora, shapes).unmatched == () and len(lora.layers) == len(shapes)
        assert kind_of(lora) == "B4M" and lora.ranks == {RANK: len(shapes)}
        assert all(layer.norm() > 0 for layer in lora.layers.values())
        told = {name: lora.metadata[name] for name in ("role", "basis_seed", "seed", "steps", "base", "rank")}
        assert told == {
            "role": role,
            "basis_seed": "0",
            "seed": "0",
            "steps": "3",
            "base": "sdxl",
            "rank": str(RANK),
        }
        assert len(lora.metadata["basis_hash"]) == 64
        keys = load_tensors(path)[0]
        assert len(keys) == 3 * len(shapes) and all(key.startswith("lora_unet_") for key in keys)
    loaded = [load_factors(path)[0] for path in parents.values()]
    assert basis_difference(*loaded)[0] == 0
    assert [step for step, _ in read_log(parents["content"].parent / "log.jsonl")] == [1, 2, 3]
    assert "torn.png" in (parents["content"].parent / "skipped.jsonl").read_text()


@pytest.mark.filterwarnings("ignore:.*left out")
def test_the_second_stage_starts_from_the_splice_bit_for_bit(
    models: Path, parents: dict[str, Path], tmp_path: Path
) -> None:
    files = parents["content"], parents["style"]
    spliced = splice(*(load_factors(path)[0] for path in files))
    settings_ = from_mapping(
        yaml.safe_load(settings(models, tmp_path, "join", **joining(models, *files)).read_text()),
        JoinSettings,
        where="the settings",
    )
    start = settings_.start(None)  # type: ignore[arg-type]
    for name, (down, up) in start.factors().items():
        assert torch.equal(down, spliced[name].down) and torch.equal(up, spliced[name].up)
    preview = {"count": 2, "steps": 1, "prompts": ["a snq in w"]}
    config = settings(models, tmp_path, "join", preview=preview, save_as="fp16", **joining(models, *files))
    assert run(config, "join", quiet=True).finished
    entity, metadata = load_factors(tmp_path / "b4m_entity.safetensors")
    assert metadata["role"] == "entity" and metadata["basis_seed"] == "0"
    assert metadata["basis_hash"] == load_factors(files[0])[1]["basis_hash"]
    for name, layer in entity.items():
        a, b, c, d = (half.float() for half in layer.halves())
        was_a, was_b, was_c, was_d = spliced[name].halves()
        assert torch.equal(a, was_a.half().float()) and torch.equal(c, was_c.half().float())
        assert not torch.equal(b, was_b.half().float()) and not torch.equal(d, was_d.half().float())
    drawn = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert drawn == ["step-00000002.png", "step-00000003.png"]


@pytest.mark.filterwarnings("ignore:.*left out")
def test_an_interrupted_run_goes_on_to_the_same_lora(
    models: Path, parents: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = joining(models, *parents.values())
    run(settings(models, tmp_path / "whole", "join", **changes), "join", quiet=True)
    config = settings(models, tmp_path / "parts", "join", preview={"count": 1, "steps": 1}, **changes)

    def command() -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["train", "b4m", "join", "--config", str(config)])
        return int(ended.value.code or 0), capsys.readouterr().out

    ctrl_c = register_optimizer_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        code, said = command()
    finally:
        ctrl_c.remove()
    lora = tmp_path / "parts" / "b4m_entity.safetensors"
    assert code == 130 and said == f"Stopped at step 1; the same command goes on from there. So far: {lora}\n"
    assert command() == (0, f"Finished at step 3: {lora}\n")
    whole, parts = load_tensors(tmp_path / "whole" / lora.name)[0], load_tensors(lora)[0]
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(PitError, match="was begun with other damping than"):
        run(settings(models, tmp_path / "parts", "join", damping=0.1, **changes), "join", quiet=True)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_wrong_settings_are_told_in_one_sentence(
    models: Path, parents: dict[str, Path], tmp_path: Path
) -> None:
    swapped = joining(models, parents["style"], parents["content"])
    missing = joining(models, parents["content"], tmp_path / "none.safetensors")
    for stage, changes, said in (
        ("content", {"others": []}, "others must name at least one set of the other side"),
        ("content", {"other_lr": 1.0}, r"other_lr must lie between 0 and train.lr \(0.01\), got 1"),
        ("content", {"rank": 100}, "Rank 100 does not fit the layer"),
        ("content", {"resolution": 33}, "resolution must be a multiple of 8"),
        ("content", {"others": {"images": "a"}}, "'others' in 'config.yaml' to be a list"),
        ("content", {"others": [{"images": "a"}]}, "entry 1 of 'others' in 'config.yaml' lacks prompt"),
        ("join", swapped, "'b4m_style.safetensors' is a style, but the settings name it as content"),
        ("join", missing, "none.safetensors"),
    ):
        with pytest.raises(PitError, match=said):
            run(settings(models, tmp_path / "out", stage, **changes), stage, quiet=True)
    assert not list(tmp_path.rglob("b4m_*.safetensors"))


def test_the_example_settings_are_valid() -> None:
    folder = Path(__file__).parents[1] / "docs" / "configs"
    content = read_config(folder / "b4m_content.yaml", SplitSettings)
    style = read_config(folder / "b4m_style.yaml", SplitSettings)
    join = read_config(folder / "b4m_join.yaml", JoinSettings)
    for first in (content, style):
        assert (first.train.lr, first.other_lr, first.rank) == (1e-4, 1e-5, 64)
        assert first.train.weight_decay == 1e-2 and len(first.others) > 1
    assert content.basis_seed == style.basis_seed
    assert join.loras == [
        content.out / "b4m_content.safetensors",
        style.out / "b4m_style.safetensors",
    ]
    assert "snq" in content.own.prompt and "w@z" in style.own.prompt
    assert "snq" in join.preview.prompts[0] and "w@z" in join.preview.prompts[0]
