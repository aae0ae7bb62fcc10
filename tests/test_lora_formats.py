"""LoRA files: every layout is read, two are written, all of SDXL's layers match, and bad files are named."""

import json

import pytest
import torch
from lora_files import LAYOUTS, lora_file, lora_key, sdxl_shapes
from safetensors.torch import save_file

from pit_core.errors import PitError
from pit_core.files import load_tensors
from pit_core.lora.formats import (
    check_fits,
    load_lora,
    lora_from_tensors,
    match_report,
    patched_weights,
    save_lora,
    to_diffusers,
    to_kohya,
)
from pit_core.lora.keys import diffusers_name, kohya_name, module_name

SDXL = sdxl_shapes(shrink=32)
SDXL_IP = sdxl_shapes(shrink=32, ip=True)
ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
ONE = {f"{ATTENTION}.to_q": (6, 4), f"{ATTENTION}.to_out.0": (6, 6)}
DOWN, UP = f"unet.{ATTENTION}.to_q.lora.down.weight", f"unet.{ATTENTION}.to_q.lora.up.weight"


def pair(**changes):
    """The smallest LoRA, with entries added, replaced or (None) taken away."""
    made = {DOWN: torch.ones(2, 4), UP: torch.ones(6, 2), **changes.pop("keys", {})}
    return {key: tensor for key, tensor in made.items() if tensor is not None}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# the full-size key lists


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shapes", "keys"), [(SDXL, 1120), (SDXL_IP, 1400)])
def test_every_layer_of_sdxl_is_read_from_every_layout_and_written_for_comfyui(layout, shapes, keys):
    file = lora_file(shapes, layout=layout)
    assert len(file) == keys
    kohya = to_kohya(file)
    assert same(kohya, {**lora_file(shapes, layout="kohya", alpha=4)})
    assert same(to_diffusers(file), lora_file(shapes, layout="peft"))
    report = match_report(file, shapes)
    assert report.matched == tuple(shapes) and report.unmatched == ()
    assert report.ranks == {4: keys // 2}


def test_the_published_key_lists_at_their_own_size():
    shapes = sdxl_shapes()
    assert sum(64 * (out + width) for out, width in shapes.values()) == 92_897_280  # at rank 64
    keys = {lora_key(module, part, "released") for module in shapes for part in ("down", "up")}
    assert len(keys) == 1120
    assert "unet.mid_block.attentions.0.transformer_blocks.9.attn2.to_out.0.lora.up.weight" in keys
    assert len(sdxl_shapes(ip=True)) == 700


def test_560_of_560_layers_and_the_weight_after_the_patch():
    file = lora_file(SDXL)
    torch.manual_seed(1)
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in SDXL.items()}
    patched = patched_weights(weights, to_kohya(file), strength=0.7)
    assert patched.keys() == weights.keys() and len(patched) == 560
    for name in SDXL:
        down, up = file[lora_key(name, "down", "released")], file[lora_key(name, "up", "released")]
        expected = weights[f"{name}.weight"].double() + 0.7 * up.double() @ down.double()
        assert (patched[f"{name}.weight"] - expected).abs().max() < 1e-6


def test_the_patch_at_full_width_and_rank():
    full = sdxl_shapes()
    shapes = {shape: name for name, shape in full.items()}  # one layer of each shape
    assert sorted(shapes) == [(640, 640), (640, 2048), (1280, 1280), (1280, 2048)]
    chosen = {name: shape for shape, name in shapes.items()}
    file = lora_file(chosen, rank=64)
    weights = {name: torch.randn(shape) / 36 for name, shape in chosen.items()}
    patched = patched_weights(weights, file)
    for name in chosen:
        down, up = file[lora_key(name, "down", "released")], file[lora_key(name, "up", "released")]
        expected = weights[name].double() + up.double() @ down.double()
        torch.testing.assert_close(patched[name].double(), expected, atol=1e-6, rtol=0)


# what matches


@pytest.mark.parametrize(
    "spell",
    [str, diffusers_name, kohya_name, lambda n: f"diffusion_model.{n}.weight", lambda n: f"{n}.weight"],
)
def test_the_model_may_name_its_modules_in_any_way(spell):
    names = [spell(name) for name in SDXL]
    assert match_report(lora_file(SDXL), names).matched == tuple(names)


def test_what_has_no_place_is_reported_and_is_an_error_where_it_is_applied():
    file = lora_file(SDXL_IP)
    report = match_report(file, SDXL)
    assert len(report.matched) == 560 and len(report.unmatched) == 140
    assert all(name.endswith(("to_k_ip", "to_v_ip")) for name in report.unmatched)
    with pytest.raises(
        PitError, match=r"140 of them are not in the model \(.*to_k_ip.*belong to an IP-Adapter"
    ):
        check_fits(file, SDXL)
    model, ip = lora_from_tensors(file).split()
    assert len(check_fits(model, SDXL)) == 560 and len(ip.layers) == 140
    strange = {"unet.foo.lora.down.weight": torch.ones(2, 4), "unet.foo.lora.up.weight": torch.ones(6, 2)}
    with pytest.raises(PitError, match=r"changes 2 layers, but 1 of them are not in the model \(foo\)"):
        check_fits(pair(keys=strange), ONE)
    with pytest.raises(PitError, match="560 of them are not in the model.*made for another model"):
        check_fits(lora_file(SDXL), {"down_blocks.0.attentions.0.proj_in": (4, 4)})


def test_layers_of_another_width_are_refused_before_anything_changes():
    with pytest.raises(PitError, match=r"as a weight of shape \(6, 4\), but the model's is \(6, 5\)"):
        check_fits(pair(), {f"{ATTENTION}.to_q": (6, 5)})


# layouts in detail


@pytest.mark.parametrize("layout", LAYOUTS)
def test_alpha_sets_the_scale_in_every_layout(layout):
    file = lora_file(ONE, layout=layout, alpha=1)
    assert {layer.scale for layer in lora_from_tensors(file).layers.values()} == {0.25}
    kohya = to_kohya(file)
    assert {kohya[key].item() for key in kohya if key.endswith(".alpha")} == {1.0}
    folded = lora_from_tensors(to_diffusers(file)).layers
    for name, layer in lora_from_tensors(file).layers.items():
        torch.testing.assert_close(folded[name].delta(), layer.delta(), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"unet.lora_alpha": 8}, 2.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_the_scale_that_diffusers_declares_in_the_metadata_counts(tmp_path, settings, scale):
    text = {"lora_adapter_metadata": json.dumps({"unet.r": 4, **settings})}
    save_file(lora_file(ONE, layout="peft"), tmp_path / "a.safetensors", metadata=text)
    lora = load_lora(tmp_path / "a.safetensors")
    assert lora.layers[f"{ATTENTION}.to_q"].scale == scale
    save_lora(tmp_path / "b.safetensors", lora, layout="diffusers")
    again = load_lora(tmp_path / "b.safetensors").layers[f"{ATTENTION}.to_q"]
    torch.testing.assert_close(again.delta(), lora.layers[f"{ATTENTION}.to_q"].delta())


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj",
        "up_blocks.0.attentions.2.proj_in",
        "up_blocks.1.resnets.0.time_emb_proj",
        "down_blocks.1.resnets.0.conv_shortcut",
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k_ip",
        "time_embedding.linear_1",
        "conv_in",
        "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0",
        "input_blocks.1.0.in_layers.2",
        "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
    ],
)
def test_names_survive_kohyas_underscores(name):
    assert module_name(kohya_name(name)) == name
    assert module_name(diffusers_name(name)) == name


def test_convolutions_and_1x1_for_linear():
    conv = {"lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3)}
    conv["lora_unet_conv_in.lora_up.weight"] = torch.randn(8, 2, 1, 1)
    layer = lora_from_tensors(conv).layers["conv_in"]
    expected = torch.einsum("or,rihw->oihw", conv["lora_unet_conv_in.lora_up.weight"][..., 0, 0], layer.down)
    torch.testing.assert_close(layer.delta(), expected)
    assert abs(layer.norm() - expected.norm().item()) < 1e-4
    weight = torch.zeros(6, 4, 1, 1)
    patched = patched_weights({f"{ATTENTION}.to_q": weight}, pair())
    assert torch.equal(patched[f"{ATTENTION}.to_q"], torch.full((6, 4, 1, 1), 2.0))


def test_half_precision_weights_stay_so_and_strength_is_a_number():
    weights = {f"{ATTENTION}.to_q": torch.ones(6, 4, dtype=torch.float16)}
    (patched,) = patched_weights(weights, pair(), -0.5).values()
    assert patched.dtype == torch.float16 and torch.equal(patched, torch.zeros(6, 4, dtype=torch.float16))
    with pytest.raises(PitError, match="strength to be a finite number"):
        patched_weights(weights, pair(), float("nan"))


def test_kohya_is_a_fixed_point_and_the_factors_are_not_copied():
    once = to_kohya(pair())
    assert same(to_kohya(once), once)
    assert (
        once[f"lora_unet_{ATTENTION.replace('.', '_')}_to_q.lora_down.weight"]
        is to_kohya(once)[f"lora_unet_{ATTENTION.replace('.', '_')}_to_q.lora_down.weight"]
    )


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_files_are_converted_whole(tmp_path, layout):
    save_file(
        lora_file(SDXL, layout="b4m"), tmp_path / "pytorch_lora_weights.safetensors", metadata={"seed": "7"}
    )
    lora = load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    save_lora(tmp_path / "new.safetensors", lora, layout=layout, dtype=torch.float16, metadata={"by": "me"})
    again = load_lora(tmp_path / "new.safetensors")
    assert set(again.layers) == set(SDXL)
    assert all(layer.down.dtype == torch.float16 and layer.scale == 1 for layer in again.layers.values())
    assert again.metadata["seed"] == "7" and again.metadata["by"] == "me"
    assert match_report(again, SDXL).kind == "B4M"


def test_what_cannot_be_written_is_not(tmp_path):
    big = pair(keys={UP: torch.full((6, 2), 1e9)})
    with pytest.raises(PitError, match="NaN or infinite"):
        save_lora(tmp_path / "a.safetensors", big, dtype=torch.float16)
    with pytest.raises(PitError, match="name the file a.safetensors"):
        save_lora(tmp_path / "a.bin", pair())
    with pytest.raises(PitError, match="one of kohya, diffusers, got 'peft'"):
        save_lora(tmp_path / "a.safetensors", pair(), layout="peft")
    original = {
        k.replace(ATTENTION, "input_blocks.4.1.transformer_blocks.0.attn1"): v for k, v in pair().items()
    }
    with pytest.raises(PitError, match="diffusers' layout cannot say"):
        save_lora(tmp_path / "a.safetensors", original, layout="diffusers")
    assert list(tmp_path.iterdir()) == []
    save_lora(tmp_path / "a.safetensors", original)
    assert len(load_tensors(tmp_path / "a.safetensors")[0]) == 3


# bad files


BAD = {
    "nothing": ({}, "holds no tensors"),
    "a UNet": ({"conv_in.weight": torch.ones(2, 2)}, "is not a LoRA: none of its 1 keys"),
    "a key too many": (pair(keys={"step": torch.ones(1)}), "beside its LoRA factors.*'step'"),
    "no up": (pair(keys={UP: None}), "lacks the up half that belongs to"),
    "no down": (pair(keys={DOWN: None}), "lacks the down half that belongs to"),
    "alpha alone": (
        {"unet.foo.alpha": torch.ones(())},
        "lacks the down half that belongs to 'unet.foo.alpha'",
    ),
    "two ranks": (pair(keys={UP: torch.ones(6, 3)}), "has rank 2 in .* but rank 3 in its up half"),
    "a vector": (pair(keys={DOWN: torch.ones(2)}), r"of shape \(2,\); factors are matrices"),
    "rank zero": (pair(keys={DOWN: torch.ones(0, 4), UP: torch.ones(6, 0)}), r"of shape \(0, 4\)"),
    "conv and linear": (pair(keys={UP: torch.ones(6, 2, 1, 1)}), "do not multiply"),
    "integers": (pair(keys={UP: torch.ones(6, 2, dtype=torch.int64)}), "stores .* as torch.int64"),
    "NaN": (pair(keys={UP: torch.full((6, 2), torch.nan)}), "NaN or infinite"),
    "infinite alpha": (pair(keys={f"{ATTENTION}.to_q.alpha": torch.tensor(torch.inf)}), "NaN or infinite"),
    "a list of alphas": (pair(keys={f"{ATTENTION}.to_q.alpha": torch.ones(6)}), "an alpha is one number"),
    "twice": (pair(keys={"unet." + DOWN: torch.ones(2, 4)}), "same part of one layer twice"),
    "twice, once flat": (
        pair(keys={f"lora_unet_{ATTENTION.replace('.', '_')}_to_q.lora_up.weight": torch.ones(6, 2)}),
        "same part of one layer twice",
    ),
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "holds LoHa factors"),
    "DoRA": (pair(keys={f"lora_unet_{ATTENTION}.dora_scale": torch.ones(6)}), "holds DoRA magnitudes"),
    "a bias": (pair(keys={"unet.foo.lora_B.bias": torch.ones(6)}), "holds biases"),
    "only prefixes": ({"unet.unet.lora.down.weight": torch.ones(2, 4)}, "lacks the up half"),
    "no name": ({"unet..lora.down.weight": torch.ones(2, 4)}, "is not a LoRA"),
    "a path": ({"unet.../../etc/passwd.lora.down.weight": torch.ones(2, 4)}, "is not a LoRA"),
    "control characters": ({"a\x1b[31m\n.lora.down.weight": torch.ones(2, 4)}, r"'a\\x1b\[31m\\n"),
    "a long name": ({"unet." * 20_000 + "x.lora.down.weight": torch.ones(2, 4)}, "is not a LoRA"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_get_one_plain_sentence(name):
    tensors, expected = BAD[name]
    with pytest.raises(PitError, match=expected) as caught:
        lora_from_tensors(tensors, name="x.safetensors")
    text = str(caught.value)
    assert text.startswith("'x.safetensors' ") and text.endswith(".")
    assert len(text) < 600 and text.isprintable()
    with pytest.raises(PitError, match="^This LoRA "):
        to_kohya(tensors)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"unet.lora_alpha": "8"}',
        '{"unet.lora_alpha": NaN}',
        '{"unet.lora_alpha": true}',
        '{"unet.alpha_pattern": [1]}',
    ],
)
def test_damaged_metadata_is_named(text):
    with pytest.raises(PitError, match="'x' has damaged metadata"):
        lora_from_tensors(pair(), {"lora_adapter_metadata": text}, name="x")


def test_a_missing_file_is_an_error_of_ours(tmp_path):
    with pytest.raises(PitError, match="There is no file"):
        load_lora(tmp_path / "a.safetensors")
