"""Training an IP-LoRA: prompts, data, the objective, and whole runs on a tiny SDXL."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_stack
import torch
import yaml
from lora_files import sdxl_shapes, unet_shapes
from PIL import Image
from sdxl_on_meta import sdxl_on_meta
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pit_core.cli import main
from pit_core.errors import PitError
from pit_core.files import load_tensors
from pit_core.ip_adapter.processor import install_ip_adapter
from pit_core.lora.formats import kind_of, load_lora, match_report, patched_weights
from pit_core.lora.ip_deltas import apply_ip_deltas, ip_layers
from pit_core.train.base_model import PROBE, unet_identity
from pit_core.train.buckets import BySize, bucket_sizes, nearest_size
from pit_core.train.config import from_mapping
from pit_core.train.ip_adapter import Dropout, noise_loss
from pit_core.train.ip_lora import IPLoRAObjective, min_snr_loss
from pit_core.train.ip_lora_data import read_examples, read_pairs
from pit_core.train.ip_lora_prompts import SHEET, check_prompt, creature_in_scene, prompt_for
from pit_core.train.ip_lora_run import IPLoRASettings, run
from pit_core.train.loop import Draws, Item, LoopConfig, train
from pit_core.train.plot import read_log

RANK = 4
ALL = slice(0, 4)


# prompts


@pytest.mark.parametrize(
    ("caption", "prompt"),
    [
        ("A photo, an owl in a forest in a book", "A photo an imaginary fantasy creature in forest"),
        ("A photo, an owl in a dark forest.", "A photo an imaginary fantasy creature in dark forest"),
        ("a painting, an owl in an old house", "a painting an imaginary fantasy creature in old house"),
        ("an owl in a forest", "an owl an imaginary fantasy creature in forest"),
        ("A photo, an owl", "A photo an imaginary fantasy creature"),
        ("an owl", "an owl an imaginary fantasy creature"),
        ("A photo,\n an owl\tIn A  forest ", "A photo an imaginary fantasy creature in forest"),
        ("a photo, an owl in armour, captain anna", "a photo an imaginary fantasy creature"),
        ("an owl in a", "an owl an imaginary fantasy creature"),
        ("in a forest", "an imaginary fantasy creature in forest"),
        (", an owl in a forest", "an imaginary fantasy creature in forest"),
        ("", "an imaginary fantasy creature"),
    ],
)
def test_a_caption_becomes_a_creature_in_its_scene(caption: str, prompt: str) -> None:
    assert creature_in_scene(caption) == prompt


def test_prompt_modes_and_own_templates() -> None:
    assert prompt_for("character_sheet", "anything") == SHEET
    assert SHEET.startswith("a character sheet displaying a creature, from several angles with 1 large front")
    assert prompt_for("creature_in_scene", "x, y in a z") == creature_in_scene("x, y in a z")
    assert prompt_for("caption", " an\n owl ") == "an owl"
    template = "a {soft} drawing of {caption}, {caption}"
    check_prompt(template)
    assert prompt_for(template, "an owl {0}") == "a {soft} drawing of an owl {0}, an owl {0}"
    with pytest.raises(PitError, match=r"character_sheet, creature_in_scene, caption, or a text with \{capt"):
        check_prompt("charactersheet")


# data


def draw(path: Path, seed: int, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_layout(folder: Path, names: Sequence[str], size: tuple[int, int] = (32, 32)) -> Path:
    for number, name in enumerate(names):
        draw(folder / "targets" / f"{name}.png", number, size)
        draw(folder / "refs" / f"{name}_ref.jpg", 100 + number)
        (folder / "targets" / f"{name}.txt").write_text(f"a photo, {name} in a b\n", "utf-8")
    return folder


def test_a_folder_gives_what_has_target_caption_and_reference(tmp_path: Path) -> None:
    write_layout(tmp_path, ["a", "b"])
    draw(tmp_path / "targets" / "alone.png", 1)
    draw(tmp_path / "targets" / "a.jpg", 1)  # a.png comes second
    draw(tmp_path / "refs" / "plain.png", 1)
    (tmp_path / "targets" / "words.txt").write_text("x")
    (tmp_path / "targets" / "b.txt").write_bytes(b"\xff\xfe\xff")
    pairs, skipped = read_pairs(tmp_path)
    assert [(pair.target, pair.ref, pair.caption) for pair in pairs] == [
        ("targets/a.jpg", "refs/a_ref.jpg", "a photo, a in a b")
    ]
    reasons = {item.file: item.reason for item in skipped}
    assert reasons == {
        "targets/a.png": "'targets/a.png' has the name of a.jpg, which is taken.",
        "targets/alone": "'alone' has no caption targets/alone.txt and no reference refs/alone_ref.jpg.",
        "targets/b": "'targets/b.txt' is not readable as UTF-8 text.",
        "targets/plain": "'plain' has no target targets/plain.jpg and no caption targets/plain.txt and no "
        "reference refs/plain_ref.jpg.",
        "targets/words": "'words' has no target targets/words.jpg and no reference refs/words_ref.jpg.",
    }


def test_a_folder_and_its_manifest_give_the_same_examples(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "data", ["a", "b"])
    pairs, _ = read_pairs(folder)
    rows = [{"target": pair.target, "ref": pair.ref, "caption": pair.caption, "more": 1} for pair in pairs]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, _ = read_examples(folder, "caption", tmp_path / "index.json", quiet=True)
    second, _ = read_examples(folder / "rows.jsonl", "caption", tmp_path / "index.json", quiet=True)
    assert first == second
    assert first[0].text == "a photo, a in a b" and first[0].ref == folder / "refs" / "a_ref.jpg"


def test_an_example_is_known_by_both_of_its_pictures(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "data", ["a"])
    before, _ = read_examples(folder, "caption", tmp_path / "index.json", quiet=True)
    draw(folder / "refs" / "a_ref.jpg", 7)
    after, _ = read_examples(folder, "caption", tmp_path / "index.json", quiet=True)
    assert before[0].sha256 != after[0].sha256


def test_pictures_that_cannot_be_read_are_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = write_layout(tmp_path / "data", ["a", "b"])
    (folder / "refs" / "a_ref.jpg").write_bytes(b"half")
    with pytest.warns(UserWarning, match="1 of 2 examples are left out: 'a_ref.jpg' is not a picture"):
        examples, skipped = read_examples(folder, "caption", tmp_path / "index.json", quiet=True)
    assert [example.path.name for example in examples] == ["b.png"]
    assert [item.file for item in skipped] == ["targets/a.png"]
    (folder / "targets" / "b.png").unlink()
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(PitError, match="Nothing in .* can be trained on; the first reason: 'b' has no target"),
    ):
        read_examples(folder, "caption", tmp_path / "index.json", quiet=True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"target": "a.png", "ref": "b.png"}', "Row 2 of 'rows.jsonl' should be {target, ref, caption}"),
        ("[]", "Row 2 of 'rows.jsonl' should be"),
        (
            '{"target": "../a.png", "ref": "b.png", "caption": ""}',
            "Row 2 of 'rows.jsonl' names a file wrongly",
        ),
        ('{"target": "a.png", "ref": "/b.png", "caption": ""}', "Row 2 of 'rows.jsonl' names a file wrongly"),
        ("nonsense", "neither a JSON list nor JSON lines"),
    ],
)
def test_names_the_row_of_a_manifest_that_is_wrong(row: str, said: str, tmp_path: Path) -> None:
    good = json.dumps({"target": "a.png", "ref": "b.png", "caption": "c"})
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{row}\n")
    with pytest.raises(PitError, match=said) as error:
        read_pairs(tmp_path / "rows.jsonl")
    assert "\n" not in str(error.value)


def test_places_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PitError, match=r"lacks the folder targets and refs; expected targets/NAME.jpg"):
        read_pairs(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(PitError, match="holds no rows"):
        read_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(PitError, match="There is no file"):
        read_pairs(tmp_path / "absent.jsonl")


def test_bucket_sizes_have_one_area_and_shapes_up_to_two_to_one() -> None:
    sizes = bucket_sizes(1024)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1344, 768)} <= set(sizes)
    assert all(w % 64 == 0 and h % 64 == 0 and 0.85 < w * h / 1024**2 <= 1 for w, h in sizes)
    assert all(0.5 <= w / h <= 2 for w, h in sizes)
    assert nearest_size(3000, 3000, sizes) == (1024, 1024)
    assert nearest_size(1300, 1000, sizes) == (1152, 896)
    assert nearest_size(1, 100, sizes)[0] < nearest_size(1, 100, sizes)[1]


class Numbers:
    def __init__(self, values: Sequence[int]) -> None:
        self.values = list(values)

    def __len__(self) -> int:
        return len(self.values)

    def fetch(self, items: Sequence[Item]) -> list[int]:
        return [self.values[index] for _, index in items]


def test_a_batch_keeps_to_the_size_of_its_first_example() -> None:
    data = BySize([Numbers(range(10)), Numbers(range(10, 15))])
    assert len(data) == 15
    assert data.fetch([(0, 3), (0, 9), (4, 0)]) == [3, 9, 0]
    mixed: list[Item] = [(2, 11), (2, 3), (2, 14), (2, 5)]
    batch = data.fetch(mixed)
    assert batch[0] == 11 and batch[2] == 14 and all(value >= 10 for value in batch)
    assert batch == data.fetch(mixed)
    assert batch == [*data.of_step(mixed[0]).fetch(mixed[:1]), *data.of_step(mixed[0]).fetch(mixed[1:])]
    seen = {data.fetch([(epoch, 11), (epoch, 3)])[1] for epoch in range(60)}
    assert seen == set(range(10, 15))


# the objective


def objective_for(**options: Any) -> IPLoRAObjective:
    unet = tiny_stack.unet()
    options = {"alphas_cumprod": torch.linspace(0.99, 0.01, 10), "rank": RANK} | options
    return IPLoRAObjective(unet, tiny_stack.adapter(unet), **options)


def examples(rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "latents": (4, 8, 8),
        "text": (5, tiny_stack.CONTEXT),
        "pooled": (tiny_stack.TEXT,),
        "tokens": (tiny_stack.TOKENS, tiny_stack.CONTEXT),
    }
    made = {name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes.items()}
    made["time_ids"] = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(rows, 1)
    return made


class Memory:
    """Ready examples as a data set."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values["latents"])

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        rows = [index for _, index in items]
        return {name: values[rows] for name, values in self.values.items()}


def predicted(unet: Any, values: dict[str, Tensor]) -> Tensor:
    added = {"text_embeds": values["pooled"], "time_ids": values["time_ids"]}
    with torch.no_grad():
        return unet(values["latents"], 3, values["text"], added_cond_kwargs=added).sample


def shaken(objective: IPLoRAObjective) -> IPLoRAObjective:
    """With a LoRA that changes something."""
    generator = torch.Generator().manual_seed(9)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return objective


@pytest.mark.parametrize("on_adapter", [False, True])
def test_gradients_reach_the_lora_and_nothing_else(on_adapter: bool) -> None:
    objective = shaken(objective_for(lora_on_ip_adapter=on_adapter))
    objective.train_mode()
    objective(examples(), Draws(0, 0, ALL, 4))["loss"].backward()
    reached = {name for name, p in objective.named_parameters() if p.grad is not None}
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    factors = {name for name, _ in objective.named_parameters() if "lora_" in name}
    assert reached == trained == factors
    assert len(factors) == 2 * len(unet_shapes(tiny_stack.unet(), ip=on_adapter))
    assert all(objective.get_parameter(name).grad.abs().max() > 0 for name in reached)


def test_an_untrained_lora_changes_nothing_and_is_drawn_by_its_seed() -> None:
    values = examples()
    base = tiny_stack.unet()
    context = install_ip_adapter(base, tiny_stack.adapter(base))
    context.set_tokens(values["tokens"])
    objective = objective_for(lora_on_ip_adapter=True)
    objective.context.set_tokens(values["tokens"])
    expected = predicted(base, values)
    assert torch.equal(predicted(objective.unet, values), expected)
    assert tiny_stack.same(predicted(shaken(objective).unet, values), expected) > 1e-3

    def down(**options: Any) -> Tensor:
        return torch.cat([layer.down.flatten() for layer in objective_for(**options).lora().layers.values()])

    first = down()
    assert torch.equal(first, down()) and not torch.equal(first, down(seed=1))
    assert float(first.std()) == pytest.approx(1 / RANK, rel=0.05)


def test_the_loss_is_the_error_of_the_noise_under_text_and_image_tokens() -> None:
    objective = objective_for()
    values = examples()
    seen: dict[str, Any] = {}
    objective.unet.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(kwargs, x=args[0], t=args[1], out=out.sample),
        with_kwargs=True,
    )
    loss = objective(values, Draws(0, 0, ALL, 4))["loss"]
    a = objective.alphas_cumprod[seen["t"]].view(4, 1, 1, 1)
    noise = (seen["x"] - a.sqrt() * values["latents"]) / (1 - a).sqrt()
    torch.testing.assert_close(loss, (seen["out"] - noise).square().mean(), rtol=1e-4, atol=1e-5)
    assert torch.equal(seen["encoder_hidden_states"], values["text"])
    assert torch.equal(seen["added_cond_kwargs"]["time_ids"], values["time_ids"])
    (source,) = objective.context.sources
    assert torch.equal(source.cond, values["tokens"]) and source.weight == 1.0
    other = objective(values | {"tokens": values["tokens"].roll(1, 0)}, Draws(0, 0, ALL, 4))["loss"]
    assert not torch.equal(other, loss)


def test_min_snr_counts_fine_steps_less() -> None:
    g = torch.Generator().manual_seed(0)
    noise, guess = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g)
    a = torch.tensor([0.99, 0.5, 0.01])
    rows = (guess - noise).square().mean(dim=(1, 2, 3)) * torch.tensor([5 / 99, 1.0, 1.0])
    torch.testing.assert_close(min_snr_loss(guess, noise, a, 5.0), rows.mean())
    torch.testing.assert_close(min_snr_loss(guess, noise, a, 1e9), noise_loss(guess, noise, a))


def test_gradient_checkpointing_and_a_unet_in_half_precision() -> None:
    gradients = []
    for checkpointing in (False, True):
        objective = shaken(objective_for(lora_on_ip_adapter=True))
        if checkpointing:
            objective.unet.enable_gradient_checkpointing()
        objective.train_mode()
        objective(examples(), Draws(0, 0, ALL, 4))["loss"].backward()
        gradients.append([p.grad for p in objective.parameters() if p.requires_grad])
    for plain, checked in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checked)
    unet = tiny_stack.unet()
    adapter = tiny_stack.adapter(unet)
    adapter.layers.to(torch.bfloat16)
    half = IPLoRAObjective(
        unet.to(torch.bfloat16), adapter, alphas_cumprod=torch.linspace(0.99, 0.01, 10), rank=RANK
    )
    loss = half(examples(), Draws(0, 0, ALL, 4))["loss"]
    loss.backward()
    with torch.no_grad():
        full = float(objective_for()(examples(), Draws(0, 0, ALL, 4))["loss"])
    assert float(loss.detach()) == pytest.approx(full, rel=0.05)
    assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {torch.float32}


def test_learns_four_examples_and_leaves_base_and_adapter_as_they_were(tmp_path: Path) -> None:
    objective = objective_for(alphas_cumprod=torch.tensor([0.5]))
    values = examples()
    frozen = {name: p.clone() for name, p in objective.named_parameters() if not p.requires_grad}

    def mean_loss() -> float:
        with torch.no_grad():
            losses = [objective(values, Draws(99, step, ALL, 4))["loss"] for step in range(4)]
        return float(torch.stack(losses).mean())

    before = mean_loss()
    config = LoopConfig(steps=12, batch_size=4, lr=3e-2, save_every=1000, ema_decay=0.5)
    train(objective, Memory(values), config, tmp_path, quiet=True)
    assert mean_loss() < before - 0.01
    now = dict(objective.named_parameters())
    assert all(torch.equal(tensor, now[name]) for name, tensor in frozen.items())


@pytest.mark.parametrize("on_adapter", [False, True])
def test_the_saved_file_changes_every_layer_as_the_trained_lora_does(
    on_adapter: bool, tmp_path: Path
) -> None:
    objective = shaken(objective_for(lora_on_ip_adapter=on_adapter))
    objective.save(tmp_path / "lora.safetensors", {"steps": 3})
    base = tiny_stack.unet()
    shapes = unet_shapes(base, ip=on_adapter)
    lora = load_lora(tmp_path / "lora.safetensors")
    report = match_report(lora, shapes)
    assert set(report.matched) == set(shapes) and report.unmatched == ()
    assert kind_of(lora) == "IP-LoRA" and report.ranks == {RANK: len(shapes)}
    assert lora.metadata["rank"] == str(RANK) and lora.metadata["steps"] == "3"
    keys = load_tensors(tmp_path / "lora.safetensors")[0]
    assert all(key.startswith("lora_unet_") for key in keys) and len(keys) == 3 * len(shapes)
    of_unet, of_adapter = lora.split()
    weights = {name: base.get_submodule(name).weight.data for name in of_unet.layers}
    changed = patched_weights(weights, of_unet)
    for name, weight in changed.items():
        peft: Any = objective.unet.get_submodule(name)
        expected = weights[name] + peft.lora_B["default"].weight @ peft.lora_A["default"].weight
        assert tiny_stack.same(weight, expected.detach()) < 1e-6
        base.get_submodule(name).weight.data = weight
    adapter = tiny_stack.adapter(tiny_stack.unet())
    if on_adapter:
        assert len(ip_layers(adapter, of_adapter)) == 2 * len(adapter.layers)
        adapter = apply_ip_deltas(adapter, of_adapter)
    values = examples()
    install_ip_adapter(base, adapter).set_tokens(values["tokens"])
    objective.context.set_tokens(values["tokens"])
    assert tiny_stack.same(predicted(base, values), predicted(objective.unet, values)) < 1e-4


def test_a_full_size_sdxl_gets_the_layers_and_the_size_of_the_published_file() -> None:
    """560 layers, 92.9 million numbers; on the meta device, where weights take neither time nor memory."""
    unet, adapter = sdxl_on_meta()
    lora = IPLoRAObjective(unet, adapter, alphas_cumprod=torch.ones(1)).lora()
    shapes = {module: layer.shape for module, layer in lora.layers.items()}
    assert shapes == sdxl_shapes() and len(shapes) == 560
    assert round(sum(layer.down.numel() + layer.up.numel() for layer in lora.layers.values()), -5) == 92.9e6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"min_snr": 0.0}, "min_snr must be a positive number"),
        ({"min_snr": 5.0, "snr_limit": 5.0}, "give one of them"),
        ({"dropout": Dropout(0.1, 0.0, 0.0)}, "Dropout needs null_tokens"),
        ({"dropout": Dropout(0.0, 0.1, 0.0)}, "Dropout needs null_pooled, null_text"),
    ],
)
def test_refuses_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(PitError, match=said):
        objective_for(**options)


def test_drops_rows_when_asked_and_refuses_batches_that_do_not_fit() -> None:
    nulls = {
        "null_tokens": torch.full((tiny_stack.TOKENS, tiny_stack.CONTEXT), 9.0),
        "null_text": torch.zeros(5, tiny_stack.CONTEXT),
        "null_pooled": torch.zeros(tiny_stack.TEXT),
    }
    objective = objective_for(dropout=Dropout(1.0, 0.0, 0.0), **nulls)
    objective(examples(), Draws(0, 0, ALL, 4))
    assert torch.equal(objective.context.sources[0].cond, nulls["null_tokens"].expand(4, -1, -1))
    values = examples()
    with pytest.raises(PitError, match="lacks tokens"):
        objective({name: value for name, value in values.items() if name != "tokens"}, Draws(0, 0, ALL, 4))
    with pytest.raises(PitError, match=r"Expected tokens of shape \('B', 4, 32\), got \('B', 4, 3\)"):
        objective(values | {"tokens": torch.zeros(4, 4, 3)}, Draws(0, 0, ALL, 4))


# whole runs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_stack's files, and five examples: three square ones, two wide ones."""
    root = tmp_path_factory.mktemp("models")
    tiny_stack.save(root)
    write_layout(root / "data", ["a", "b", "c"])
    for number, name in enumerate(("d", "e")):
        draw(root / "data" / "targets" / f"{name}.png", 20 + number, (60, 32))
        draw(root / "data" / "refs" / f"{name}_ref.png", 30 + number)
        (root / "data" / "targets" / f"{name}.txt").write_text(f"a photo, {name} in a c")
    draw(root / "data" / "targets" / "alone.png", 1)
    return root


def settings(models: Path, out: Path, /, **changes: Any) -> Path:
    steps = {"steps": 4, "batch_size": 2, "lr": 1e-2, "log_every": 1, "save_every": 3, "ema_decay": 0.5}
    values: dict[str, Any] = {
        "base": str(models / "sdxl"),
        "image_encoder": str(models / "image_encoder"),
        "ip_adapter": str(models / "adapter.safetensors"),
        "data": str(models / "data"),
        "out": str(out),
        "prompt": "creature_in_scene",
        "rank": RANK,
        "resolution": tiny_stack.PIXELS,
        "preview": {"count": 0},
        "train": steps | changes.pop("train", {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(values | changes))
    return out / "config.yaml"


@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_run_ends_in_a_lora_that_says_how_it_was_trained(models: Path, tmp_path: Path) -> None:
    preview = {"count": 2, "steps": 1}
    changes = {"preview": preview, "buckets": True, "lora_on_ip_adapter": True, "save_as": "fp16"}
    with pytest.warns(UserWarning, match="1 of 6 examples are left out: 'alone' has no caption"):
        result = run(settings(models, tmp_path, dropout={"image": 0.1, "text": 0.1, "both": 0.1}, **changes))
    assert (result.step, result.finished) == (4, True)
    lora = load_lora(tmp_path / "ip_lora.safetensors")
    shapes = unet_shapes(tiny_stack.unet(), ip=True)
    assert match_report(lora, shapes).unmatched == () and len(lora.layers) == len(shapes)
    assert all(layer.norm() > 0 and layer.down.dtype == torch.float16 for layer in lora.layers.values())
    told = {name: lora.metadata[name] for name in ("prompt", "rank", "base", "ip_adapter", "steps")}
    assert told == {
        "prompt": "creature_in_scene",
        "rank": str(RANK),
        "base": "sdxl",
        "ip_adapter": "adapter.safetensors",
        "steps": "4",
    }
    assert len(lora.metadata["ip_adapter_hash"]) == 64
    assert [step for step, _ in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4]
    drawn = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert drawn == ["step-00000003.png", "step-00000004.png"]
    with Image.open(tmp_path / "previews" / drawn[0]) as picture:
        assert picture.width > 400 and picture.height > 400
    skipped = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert skipped["file"] == "targets/alone"
    sizes = {tuple(load_tensors(path)[0]["latents"].shape[1:]) for path in (tmp_path / "cache").iterdir()}
    assert sizes == {(4, 8, 8), (4, 6, 10)}


@pytest.mark.parametrize(("name", "place"), [("config.json", 0), ("a.safetensors", 3), ("a.safetensors", -1)])
def test_a_run_knows_its_unet_by_either_end_of_its_files(tmp_path: Path, name: str, place: int) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "unet" / "a.safetensors").write_bytes(bytes(3 * PROBE))
    (tmp_path / "unet" / "notes.md").touch()
    before = unet_identity(tmp_path)
    (tmp_path / "unet" / "notes.md").write_text("anything")
    assert unet_identity(tmp_path) == before
    data = bytearray((tmp_path / "unet" / name).read_bytes())
    data[place] ^= 1
    (tmp_path / "unet" / name).write_bytes(data)
    assert unet_identity(tmp_path) != before


@pytest.mark.filterwarnings("ignore:.*left out")
def test_an_interrupted_run_goes_on_to_the_same_lora(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With previews and without, from a cache that is there and one that is not."""
    run(settings(models, tmp_path / "whole"), quiet=True)
    config = settings(models, tmp_path / "parts", preview={"count": 1, "steps": 1}, cache="cache")

    def command() -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["train", "ip-lora", "--config", str(config)])
        return int(ended.value.code or 0), capsys.readouterr().out

    ctrl_c = register_optimizer_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        code, said = command()
    finally:
        ctrl_c.remove()
    lora = tmp_path / "parts" / "ip_lora.safetensors"
    assert code == 130 and said == f"Stopped at step 1; the same command goes on from there. So far: {lora}\n"
    assert command() == (0, f"Finished at step 4: {lora}\n")
    whole, parts = load_tensors(tmp_path / "whole" / "ip_lora.safetensors")[0], load_tensors(lora)[0]
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(PitError, match="was begun with other prompt, data, rank than these settings give"):
        run(settings(models, tmp_path / "parts", prompt="caption", rank=2), quiet=True)


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "sheet"}, "Expected prompt to be character_sheet, creature_in_scene, caption"),
        ({"rnk": 2}, "unknown setting 'rnk'; did you mean 'rank'"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"resolution": 30}, "multiple of 8"),
        ({"save_as": "int8"}, "save_as must be one of"),
        ({"data": "absent"}, "There is no file"),
        ({"base": "absent"}, "unet/config.json is missing"),
        ({"ip_adapter": "absent.safetensors"}, "There is no file"),
        ({"preview": {"count": -1}}, "Expected preview with a count from 0"),
    ],
)
def test_a_run_refuses_wrong_settings_in_one_sentence(
    changes: dict[str, Any], said: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(PitError, match=said) as error:
        run(settings(models, tmp_path, **changes), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ip_lora.safetensors").exists()


def test_the_example_settings_are_valid() -> None:
    path = Path(__file__).parents[1] / "docs" / "configs" / "ip_lora.yaml"
    made = from_mapping(yaml.safe_load(path.read_text()), IPLoRASettings, where=path.name, folder=path.parent)
    assert (made.rank, made.prompt, made.train.lr, made.train.steps) == (64, "creature_in_scene", 1e-4, 10000)
    assert made.train.batch_size // made.train.accumulate == 2 and made.dropout == Dropout(0, 0, 0)
