"""Training an IP-Adapter: the objective, the data, and whole runs on tiny random models of both plans."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from pit_core.cli import main
from pit_core.errors import PitError
from pit_core.files import load_tensors
from pit_core.ip_adapter.adapter import IPAdapter, new_ip_adapter
from pit_core.ip_adapter.checkpoint import load_ip_adapter
from pit_core.ip_adapter.layers import layers_of_unet
from pit_core.ip_adapter.processor import uninstall_ip_adapter
from pit_core.ip_adapter.resampler import ImageProjection, Resampler
from pit_core.train.base_model import load_base
from pit_core.train.captioned import Captioned, Picture, Shards, centre_square, read_rows, scan
from pit_core.train.config import from_mapping
from pit_core.train.ip_adapter import Dropout, IPAdapterObjective, drop_rows, noise_loss
from pit_core.train.ip_adapter_run import AdapterSettings, run
from pit_core.train.loop import Draws, Item, LoopConfig, train
from pit_core.train.plot import read_log, smoothed

TEXT, POOLED, HIDDEN, PROJECTION = 16, 12, 8, 6
ALL = slice(0, 4)


# tiny models


def tiny_unet(plan: str) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    common: dict[str, Any] = {"sample_size": 4, "norm_num_groups": 4, "attention_head_dim": 2}
    if plan == "sd15":  # SD1.5's own blocks: 16 text layers
        return UNet2DConditionModel(block_out_channels=(4, 8, 8, 8), cross_attention_dim=TEXT, **common)
    return UNet2DConditionModel(
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=2 * TEXT,  # two text encoders side by side
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED + 6 * 4,
        use_linear_projection=True,
        **common,
    )


def tiny_adapter(unet: Any, kind: str = "plus") -> IPAdapter:
    torch.manual_seed(1)
    context = unet.config.cross_attention_dim
    if kind == "base":
        return new_ip_adapter(unet, ImageProjection(PROJECTION, context, 2))
    sizes = {"dim": 8, "depth": 1, "dim_head": 4, "heads": 2, "num_queries": 3}
    return new_ip_adapter(unet, Resampler(**sizes, embedding_dim=HIDDEN, output_dim=context))


def write_tokenizer(folder: Path) -> None:
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=7)
    tokenizer.save_pretrained(folder)


def write_base(folder: Path, plan: str) -> Path:
    """A Stable Diffusion folder with random weights, as diffusers writes one."""
    from diffusers import AutoencoderKL, DDPMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tiny_unet(plan).save_pretrained(folder / "unet")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.18,
    )
    vae.save_pretrained(folder / "vae")
    text = CLIPTextConfig(
        vocab_size=54,
        hidden_size=TEXT,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=POOLED,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    write_tokenizer(folder / "tokenizer")
    CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    if plan == "sdxl":
        write_tokenizer(folder / "tokenizer_2")
        CLIPTextModelWithProjection(text).save_pretrained(folder / "text_encoder_2")
    schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    schedule.save_pretrained(folder / "scheduler")
    return folder


def write_vision(folder: Path) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(2)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=PROJECTION,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders sd15, sdxl and vision, and four pictures of different shapes with their rows."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    write_base(root / "sd15", "sd15")
    write_base(root / "sdxl", "sdxl")
    write_vision(root / "vision")
    write_pictures(root / "pictures")
    rows = [{"image_file": f"{name}.png", "text": name} for name in ("red", "green", "blue", "grey")]
    (root / "rows.json").write_text(json.dumps(rows))
    return root


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    shapes = {"red": (40, 32), "green": (32, 32), "blue": (30, 60), "grey": (33, 33)}
    for number, (name, (width, height)) in enumerate(shapes.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")


# the objective


def examples(unet: Any, kind: str = "plus") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "latents": (4, 4, 4),
        "text": (7, unet.config.cross_attention_dim),
        "pooled": (POOLED,),
        "features": (5, HIDDEN) if kind == "plus" else (PROJECTION,),
    }
    made = {name: torch.randn(4, *shape, generator=generator) for name, shape in shapes.items()}
    made["time_ids"] = torch.tensor([[64.0, 48, 0, 8, 32, 32]]).repeat(4, 1)
    return made


def objective_for(plan: str, kind: str = "plus", **options: Any) -> IPAdapterObjective:
    unet = tiny_unet(plan)
    nulls = {
        "null_features": torch.full((5, HIDDEN) if kind == "plus" else (PROJECTION,), 9.0),
        "null_text": torch.full((7, unet.config.cross_attention_dim), 8.0),
        "null_pooled": torch.full((POOLED,), 7.0) if plan == "sdxl" else None,
        "alphas_cumprod": torch.linspace(0.99, 0.01, 10),
    }
    return IPAdapterObjective(unet, tiny_adapter(unet, kind), **(nulls | options))


class Memory:
    """Ready examples as a data set."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values["latents"])

    def fetch(self, items: Sequence[Item]) -> dict[str, Tensor]:
        rows = [index for _, index in items]
        return {name: values[rows] for name, values in self.values.items()}


def mean_loss(objective: IPAdapterObjective, values: dict[str, Tensor], count: int = 8) -> float:
    with torch.no_grad():
        losses = [objective(values, Draws(99, step, ALL, 4))["loss"] for step in range(count)]
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("plan", ["sd15", "sdxl"])
@pytest.mark.parametrize("kind", ["plus", "base"])
def test_the_loss_is_the_error_of_the_predicted_noise(plan: str, kind: str) -> None:
    objective = objective_for(plan, kind, dropout=Dropout(0, 0, 0))
    values = examples(objective.unet, kind)
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
    added = seen["added_cond_kwargs"]
    if plan == "sdxl":
        assert torch.equal(added["text_embeds"], values["pooled"])
        assert torch.equal(added["time_ids"], values["time_ids"])
    else:
        assert added is None


def test_the_balanced_loss_is_the_velocitys_and_stops_at_its_limit() -> None:
    g = torch.Generator().manual_seed(0)
    picture, noise, predicted = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(3))
    a = torch.tensor([0.99, 0.5, 0.01])
    keep, spread = a.sqrt().view(-1, 1, 1, 1), (1 - a).sqrt().view(-1, 1, 1, 1)
    noisy = keep * picture + spread * noise

    def velocity(noise: torch.Tensor) -> torch.Tensor:
        return keep * noise - spread * (noisy - spread * noise) / keep

    squared = (velocity(predicted) - velocity(noise)).pow(2)
    torch.testing.assert_close(noise_loss(predicted, noise, a, snr_limit=1e9), squared.mean())
    # An SNR of 99 counts as one of 10 - 1.
    rows = squared.mean(dim=(1, 2, 3)) * torch.tensor([0.1, 1.0, 1.0])
    torch.testing.assert_close(noise_loss(predicted, noise, a, snr_limit=10.0), rows.mean())
    torch.testing.assert_close(noise_loss(predicted, noise, a), (predicted - noise).pow(2).mean())


def test_the_sd15_plan_has_sixteen_layers() -> None:
    assert len(layers_of_unet(tiny_unet("sd15"))) == 16


@pytest.mark.parametrize("plan", ["sd15", "sdxl"])
@pytest.mark.parametrize("train_layers", [True, False])
def test_gradients_reach_the_adapter_and_nothing_else(plan: str, train_layers: bool) -> None:
    objective = objective_for(plan, train_layers=train_layers)
    objective(examples(objective.unet), Draws(0, 0, ALL, 4))["loss"].backward()
    reached = {name for name, p in objective.named_parameters() if p.grad is not None}
    parts = ("adapter.image_proj.", "adapter.ip_adapter.") if train_layers else ("adapter.image_proj.",)
    expected = {name for name, _ in objective.named_parameters() if name.startswith(parts)}
    assert reached == expected
    assert all(objective.get_parameter(name).grad.abs().max() > 0 for name in reached)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        objective = objective_for("sdxl")
        if checkpointing:
            objective.unet.enable_gradient_checkpointing()
        objective.train_mode()
        objective(examples(objective.unet), Draws(0, 0, ALL, 4))["loss"].backward()
        gradients.append([p.grad for p in objective.parameters() if p.requires_grad])
    for plain, checked in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checked)


def test_only_the_adapter_is_put_in_training_mode() -> None:
    objective = objective_for("sd15")
    objective.train_mode()
    assert objective.adapter.training
    assert not any(module.training for module in objective.unet.modules())


def test_a_fresh_adapter_starts_from_the_base_models_keys_and_values() -> None:
    objective = objective_for("sd15")
    for layer in layers_of_unet(objective.unet):
        ours, theirs = objective.adapter.layers[str(layer.key)], objective.unet.get_submodule(layer.module)
        assert torch.equal(ours.to_k_ip.weight, theirs.to_k.weight)
        assert torch.equal(ours.to_v_ip.weight, theirs.to_v.weight)


def test_drops_image_text_or_both_each_with_its_own_probability() -> None:
    objective = objective_for("sdxl", dropout=Dropout(0.05, 0.1, 0.2))
    rows = 4000
    values = {
        name: tensor[:1].expand(rows, *tensor.shape[1:]) for name, tensor in examples(objective.unet).items()
    }
    chance = Draws(0, 0, slice(0, rows), rows).rand()
    dropped = drop_rows(values, chance, objective.dropout, objective.nulls)
    image = (dropped["features"] == 9.0).flatten(1).all(1)
    text = (dropped["text"] == 8.0).flatten(1).all(1)
    pooled = (dropped["pooled"] == 7.0).all(1)
    assert torch.equal(text, pooled)
    shares = [float(rows_.float().mean()) for rows_ in (image & ~text, text & ~image, image & text)]
    assert shares == pytest.approx([0.05, 0.1, 0.2], abs=0.02)
    assert torch.equal(dropped["features"][~image], values["features"][~image])
    assert torch.equal(dropped["text"][~text], values["text"][~text])


def test_the_frozen_unet_may_run_in_half_precision() -> None:
    objective = objective_for("sdxl")
    objective.unet.to(torch.bfloat16)
    loss = objective(examples(objective.unet), Draws(0, 0, ALL, 4))["loss"]
    loss.backward()
    full = objective_for("sdxl")
    assert float(loss.detach()) == pytest.approx(mean_of_first(full), rel=0.05)
    assert all(p.grad.dtype == torch.float32 for p in objective.parameters() if p.requires_grad)


def mean_of_first(objective: IPAdapterObjective) -> float:
    with torch.no_grad():
        return float(objective(examples(objective.unet), Draws(0, 0, ALL, 4))["loss"])


def teach_the_base(objective: IPAdapterObjective, values: dict[str, Tensor], steps: int) -> None:
    """Some denoising on pictures of pure chance, so that the base knows how but none of the four examples."""
    unet = objective.unet.requires_grad_(True)
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    text = values["text"].repeat(4, 1, 1)
    added = {"text_embeds": values["pooled"].repeat(4, 1), "time_ids": values["time_ids"].repeat(4, 1)}
    for step in range(steps):
        x, noise = torch.randn(2, 16, 4, 4, 4, generator=torch.Generator().manual_seed(step))
        out = unet(0.5**0.5 * (x + noise), 0, text, added_cond_kwargs=added).sample
        optimizer.zero_grad()
        (out - noise).square().mean().backward()
        optimizer.step()
    unet.requires_grad_(False)


@pytest.mark.parametrize("plan", ["sd15", "sdxl"])
def test_learns_four_examples_and_leaves_the_base_as_it_was(plan: str, tmp_path: Path) -> None:
    objective = objective_for(plan, alphas_cumprod=torch.tensor([0.5]), dropout=Dropout(0, 0, 0))
    values = examples(objective.unet)
    teach_the_base(objective, values, steps=30)
    objective.adapter.layers.copy_from_unet(objective.unet)
    before = mean_loss(objective, values)
    untouched = {name: tensor.clone() for name, tensor in objective.unet.state_dict().items()}
    fresh = {name: tensor.clone() for name, tensor in objective.adapter.state_dict().items()}
    config = LoopConfig(steps=40, batch_size=8, lr=2e-2, save_every=1000, ema_decay=0.9)
    train(objective, Memory(values), config, tmp_path, quiet=True)
    after = mean_loss(objective, values)
    assert after < before - 0.005
    # It is the pictures' own features that help, not just any.
    assert after < mean_loss(objective, values | {"features": values["features"].roll(1, 0)}) - 0.003
    assert all(torch.equal(untouched[name], now) for name, now in objective.unet.state_dict().items())
    same = [name for name, now in objective.adapter.state_dict().items() if torch.equal(fresh[name], now)]
    assert same == []
    uninstall_ip_adapter(objective.unet)
    types = {type(processor) for processor in objective.unet.attn_processors.values()}
    assert types == {type(processor) for processor in tiny_unet(plan).attn_processors.values()}


def test_saves_the_released_layout(tmp_path: Path) -> None:
    objective = objective_for("sd15")
    objective.save(tmp_path / "a.safetensors", {"steps": 3}, torch.float16)
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    layers = {key for key in tensors if key.startswith("ip_adapter.")}
    assert layers == {f"ip_adapter.{2 * n + 1}.to_{kv}_ip.weight" for n in range(16) for kv in "kv"}
    assert "image_proj.latents" in tensors and metadata["steps"] == "3"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features": None}, "lacks features"),
        ({"pooled": None, "time_ids": None}, "lacks pooled, time_ids"),
        ({"features": torch.zeros(4, 6, HIDDEN)}, r"Expected features of shape \('B', 5, 8\)"),
        ({"text": torch.zeros(4, 7, 3)}, r"Expected text of shape \('B', 7, 32\)"),
    ],
)
def test_refuses_batches_that_do_not_fit(change: dict[str, Any], said: str) -> None:
    objective = objective_for("sdxl")
    values = {k: v for k, v in (examples(objective.unet) | change).items() if v is not None}
    with pytest.raises(PitError, match=said):
        objective(values, Draws(0, 0, ALL, 4))


def test_refuses_an_adapter_of_another_plan_and_sdxl_without_pooled() -> None:
    with pytest.raises(PitError, match="pair it with its own family"):
        IPAdapterObjective(
            tiny_unet("sdxl"),
            tiny_adapter(tiny_unet("sd15")),
            alphas_cumprod=torch.ones(2),
            null_features=torch.zeros(5, HIDDEN),
            null_text=torch.zeros(7, 32),
        )
    with pytest.raises(PitError, match="null_pooled"):
        objective_for("sdxl", null_pooled=None)


@pytest.mark.parametrize("wrong", [{"image": -0.1}, {"image": 0.5, "text": 0.5, "both": 0.5}])
def test_refuses_dropout_that_is_no_probability(wrong: dict[str, float]) -> None:
    with pytest.raises(PitError, match="dropout of image, text and both"):
        Dropout(**wrong)


# the data


def test_reads_rows_from_json_lines_and_from_a_list(tmp_path: Path) -> None:
    rows = [{"image_file": "a/b.png", "text": "one", "more": 1}, {"image_file": "c.jpg", "text": ""}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    first, second = read_rows(tmp_path / "rows.json"), read_rows(tmp_path / "rows.jsonl")
    assert first == second
    assert [(row.image_file, row.text) for row in first] == [("a/b.png", "one"), ("c.jpg", "")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"image_file": "a.png"}', "Row 1"),
        ('{"image_file": "a.png", "text": "x"}\n[]', "Row 2"),
        ('{"image_file": "../a.png", "text": "x"}', "leaves the image folder"),
        ('{"image_file": "/etc/a.png", "text": "x"}', "leaves the image folder"),
        ('{"image_file": "C:\\\\a.png", "text": "x"}', "leaves the image folder"),
        ("nonsense", "neither a JSON list nor JSON lines"),
        ("[]", "holds no rows"),
    ],
)
def test_names_the_row_that_is_wrong(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(PitError, match=said):
        read_rows(tmp_path / "rows.jsonl")


def test_broken_pictures_are_reported_and_left_out(models: Path, tmp_path: Path) -> None:
    """As a warning: the command line shows those, and keeps the libraries' logs quiet."""
    write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "broken.png").write_bytes((tmp_path / "pictures" / "red.png").read_bytes()[:200])
    (tmp_path / "pictures" / "empty.png").touch()
    names = ["red.png", "broken.png", "green.png", "absent.png", "empty.png"]
    rows = read_rows(_rows(tmp_path, names))
    with pytest.warns(UserWarning, match="3 of 5 rows are left out"):
        pictures, skipped = scan(rows, tmp_path / "pictures", tmp_path / "index.json", quiet=True)
    assert [picture.path.name for picture in pictures] == ["red.png", "green.png"]
    assert [item.file for item in skipped] == ["broken.png", "absent.png", "empty.png"]
    assert (pictures[0].width, pictures[0].height) == (40, 32)

    Image.new("RGB", (9, 8)).save(tmp_path / "pictures" / "broken.png")
    os.utime(tmp_path / "pictures" / "broken.png", ns=(1, 1))
    again, _ = scan(rows, tmp_path / "pictures", tmp_path / "index.json", quiet=True)
    assert [picture.path.name for picture in again] == ["red.png", "broken.png", "green.png"]


def test_a_set_without_any_readable_picture_is_refused(tmp_path: Path) -> None:
    rows = read_rows(_rows(tmp_path, ["absent.png"]))
    with pytest.raises(PitError, match="None of the 1 pictures can be read"):
        scan(rows, tmp_path, tmp_path / "index.json", quiet=True)


def _rows(folder: Path, names: list[str]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"image_file": name, "text": "x"}) for name in names))
    return path


@pytest.mark.parametrize(
    ("size", "ids"),
    [
        ((40, 20), [20, 40, 0, 8, 16, 16]),
        ((20, 40), [40, 20, 8, 0, 16, 16]),
        ((16, 16), [16, 16, 0, 0, 16, 16]),
        ((1, 50), [50, 1, 392, 0, 16, 16]),
        ((8, 9), [9, 8, 1, 0, 16, 16]),
    ],
)
def test_the_middle_square_is_cut_out_and_sdxl_is_told_where(size: tuple[int, int], ids: list[int]) -> None:
    square, found = centre_square(Image.new("RGB", size), 16)
    assert square.size == (16, 16)
    assert found == ids


def test_transparent_pictures_lie_on_white() -> None:
    square, _ = centre_square(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), 16)
    assert square.getextrema() == ((255, 255),) * 3


def captioned(folder: Path, names: Sequence[str]) -> Captioned:
    pictures = [Picture(folder / f"{name}.png", name, name, 8, 8) for name in names]
    return Captioned(pictures, 16, _lengths, _grey)


def _lengths(captions: Sequence[str]) -> Tensor:
    return torch.tensor([[[len(caption)]] for caption in captions])


def _grey(image: Image.Image) -> Tensor:
    return torch.zeros(1, 3, 8, 8)


def test_shards_hand_out_what_was_encoded_and_are_built_once(models: Path, tmp_path: Path) -> None:
    names = ["red", "green", "blue", "grey", "red"]
    source = captioned(models / "pictures", names)
    calls: list[int] = []

    def encode(raw: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(len(raw["ids"]))
        return {"latents": raw["pixels"].float() / 255, "text": raw["ids"].float()}

    shards = Shards(tmp_path, source.pictures, "key", size=2)
    assert shards.missing() == [0, 1, 2]
    shards.build([1], source, encode)
    assert Shards(tmp_path, source.pictures, "key", size=2).missing() == [0, 2]
    shards.build(shards.missing(), source, encode, batch_size=1)
    assert calls == [2, 1, 1, 1] and shards.missing() == []
    order: list[Item] = [(3, 4), (0, 0), (0, 3), (1, 2)]
    expected, got = source.fetch(order), shards.fetch(order)
    assert torch.equal(got["latents"], expected["pixels"].float() / 255)
    assert torch.equal(got["text"], expected["ids"].float())
    copy = pickle.loads(pickle.dumps(shards))  # what a loader's worker gets
    assert torch.equal(copy.fetch(order)["latents"], got["latents"])


def test_shards_are_named_by_pictures_captions_and_models(models: Path, tmp_path: Path) -> None:
    pictures = captioned(models / "pictures", ["red", "green"]).pictures

    def name(pictures: Sequence[Picture], key: str = "key") -> str:
        return Shards(tmp_path, pictures, key).names[0]

    others = [
        name(pictures, "other"),
        name([pictures[1], pictures[0]]),
        name([replace(pictures[0], text="another"), pictures[1]]),
        name([replace(pictures[0], sha256="another"), pictures[1]]),
    ]
    assert name(pictures) not in others and len(set(others)) == 4
    assert name([replace(p, path=Path("elsewhere")) for p in pictures]) == name(pictures)


def test_a_damaged_shard_is_named(models: Path, tmp_path: Path) -> None:
    source = captioned(models / "pictures", ["red"])
    shards = Shards(tmp_path, source.pictures, "key")
    (tmp_path / shards.names[0]).write_bytes(b"half")
    with pytest.raises(PitError, match=shards.names[0]):
        shards.fetch([(0, 0)])


# whole runs


def settings(models: Path, out: Path, plan: str, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "base": str(models / plan),
        "image_encoder": str(models / "vision"),
        "rows": str(models / "rows.json"),
        "images": str(models / "pictures"),
        "out": str(out),
        "resolution": 32,
        "tokens": 3,
        "resampler": {"dim": 8, "depth": 1, "dim_head": 4, "heads": 2},
        "train": {"steps": 3, "batch_size": 4, "lr": "1e-3", "log_every": 1, "save_every": 2},
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / "config.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


@pytest.mark.parametrize(
    ("plan", "kind", "cached"), [("sdxl", "plus", True), ("sd15", "plus", False), ("sd15", "base", True)]
)
def test_a_run_ends_in_an_adapter_that_loads(
    plan: str, kind: str, cached: bool, models: Path, tmp_path: Path
) -> None:
    before = folder_bytes(models)
    changes = {"adapter": kind} | ({"cache": str(tmp_path / "cache")} if cached else {})
    result = run(settings(models, tmp_path, plan, **changes), quiet=True)
    assert (result.step, result.finished) == (3, True)
    adapter = load_ip_adapter(tmp_path / "ip_adapter.safetensors")
    unet = load_base(models / plan).unet
    layers = layers_of_unet(unet)
    adapter.layers.check_fits(layers)
    assert (adapter.kind, adapter.num_tokens, len(layers)) == (kind, 3, 16 if plan == "sd15" else 11)
    for layer in layers:
        theirs = unet.get_submodule(layer.module).to_k.weight
        change = (adapter.layers[str(layer.key)].to_k_ip.weight - theirs).abs().max()
        assert 0 < change < 0.02  # it began as the base model's own, and has learned
    assert [step for step, _ in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size[0] > 500
    assert (tmp_path / "skipped.jsonl").read_text() == ""
    assert folder_bytes(models) == before


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_cached_and_live_encoding_train_the_same_adapter(models: Path, tmp_path: Path) -> None:
    worker = {"steps": 3, "batch_size": 4, "lr": 1e-3, "workers": 1}
    run(settings(models, tmp_path / "live", "sdxl", train=worker), quiet=True)
    run(settings(models, tmp_path / "cached", "sdxl", cache=str(tmp_path / "cache")), quiet=True)
    live, _ = load_tensors(tmp_path / "live" / "ip_adapter.safetensors")
    cached, _ = load_tensors(tmp_path / "cached" / "ip_adapter.safetensors")
    assert max(float((live[key] - cached[key]).abs().max()) for key in live) < 1e-5


def _run_in_each_process(config: Path) -> None:
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # the fork has inherited a single-process state
    run(config, quiet=True)
    assert PartialState().num_processes == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_share_the_encoding_and_train_the_same_adapter(models: Path, tmp_path: Path) -> None:
    from accelerate import debug_launcher

    one = settings(models, tmp_path / "one", "sd15", cache=str(tmp_path / "cache-of-one"))
    two = settings(models, tmp_path / "two", "sd15", cache=str(tmp_path / "cache-of-two"))
    run(one, quiet=True)
    debug_launcher(_run_in_each_process, args=(two,), num_processes=2)
    a, b = (load_tensors(tmp_path / name / "ip_adapter.safetensors")[0] for name in ("one", "two"))
    losses = [read_log(tmp_path / name / "log.jsonl") for name in ("one", "two")]
    assert [step for step, _ in losses[1]] == [1, 2, 3]
    assert all(x == pytest.approx(y, abs=2e-6) for (_, x), (_, y) in zip(*losses, strict=True))
    # AdamW turns rounding in tiny gradients into parts of a step; three steps of 1e-3 were made.
    assert max(float((a[key] - b[key]).abs().max()) for key in a) < 2e-4
    names = [sorted(p.name for p in (tmp_path / f"cache-of-{name}").iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]


def test_a_run_can_train_the_projection_alone_and_start_from_a_file(models: Path, tmp_path: Path) -> None:
    run(settings(models, tmp_path / "a", "sd15"), quiet=True)
    start = tmp_path / "a" / "ip_adapter.safetensors"
    changes = {"start": str(start), "train_layers": False}
    run(settings(models, tmp_path / "b", "sd15", **changes), quiet=True)
    first, second = load_tensors(start)[0], load_tensors(tmp_path / "b" / "ip_adapter.safetensors")[0]
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    assert changed == {key for key in first if key.startswith("image_proj.")}


def test_an_interrupted_run_goes_on(models: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    short = {"steps": 2, "batch_size": 4, "lr": 1e-3, "save_every": 2}
    run(settings(models, whole, "sd15", train=short | {"steps": 4}), quiet=True)
    run(settings(models, parts, "sd15", train=short), quiet=True)
    run(settings(models, parts, "sd15", train=short | {"steps": 4}), quiet=True)
    a, b = (load_tensors(folder / "ip_adapter.safetensors")[0] for folder in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_command_says_where_it_stopped_and_where_the_adapter_is(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(models, tmp_path, "sd15")
    adapter = tmp_path / "ip_adapter.safetensors"

    def command() -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["train", "ip-adapter", "--config", str(config)])
        return int(ended.value.code or 0), capsys.readouterr().out

    ctrl_c = register_optimizer_step_post_hook(lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        code, said = command()
    finally:
        ctrl_c.remove()
    assert code == 130 and load_ip_adapter(adapter).num_tokens == 3
    assert said == f"Stopped at step 1; the same command goes on from there. So far: {adapter}\n"
    assert command() == (0, f"Finished at step 3: {adapter}\n")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bse": "x"}, "unknown setting 'bse'; did you mean 'base'"),
        ({"train": {"steps": 1, "batch_size": 1, "stepz": 2}}, "unknown setting 'stepz'"),
        ({"train": {"steps": 1}}, "lacks batch_size"),
        ({"train": {"steps": 1, "batch_size": 3.5}}, "'batch_size' .* to be a whole number, got 3.5"),
        ({"adapter": "faceid"}, "adapter must be 'plus' or 'base'"),
        ({"resolution": 30}, "multiple of 8"),
        ({"frozen": "int8"}, "frozen must be one of"),
        ({"base": "absent"}, "unet/config.json is missing"),
        ({"image_encoder": "absent"}, "absent"),
        ({"images": "absent"}, "There is no folder"),
        ({"dropout": {"image": 2}}, "dropout"),
    ],
)
def test_a_run_refuses_wrong_settings_in_one_sentence(
    changes: dict[str, Any], said: str, models: Path, tmp_path: Path
) -> None:
    with pytest.raises(PitError, match=said) as error:
        run(settings(models, tmp_path, "sd15", **changes), quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ip_adapter.safetensors").exists()


def test_a_base_model_with_missing_weights_is_refused(models: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base = write_base(tmp_path / "base", "sd15")
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors, _ = load_tensors(weights)
    tensors.pop("conv_in.weight")
    save_file(tensors, weights)
    with pytest.raises(
        PitError, match=r"lacks 1 weights of its UNet2DConditionModel, such as conv_in\.weight"
    ):
        load_base(base)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PitError, match="cannot be loaded as UNet2DConditionModel"):
        load_base(base)


def test_a_base_model_that_predicts_something_else_is_refused(models: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "sd15")
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(PitError, match="predicts v_prediction"):
        load_base(base)


@pytest.mark.parametrize("name", ["ip_adapter_sdxl.yaml", "ip_adapter_sd15.yaml"])
def test_the_example_settings_are_valid(name: str) -> None:
    path = Path(__file__).parents[1] / "docs" / "configs" / name
    values = yaml.safe_load(path.read_text())
    made = from_mapping(values, AdapterSettings, where=name, folder=path.parent)
    assert made.adapter == "plus" and made.train.lr == 1e-4 and made.dropout == Dropout()


def test_the_log_counts_a_repeated_step_once_and_ignores_a_torn_line(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 3}',
        '{"step": 2, "loss": 9}',
        '{"step": 2, "loss": 2}',
        '{"step": 3, "saved": 1}',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    assert read_log(tmp_path / "log.jsonl") == [(1, 3.0), (2, 2.0)]
    assert smoothed([4.0, 2.0, 0.0], 2) == [4.0, 3.0, 1.0]
