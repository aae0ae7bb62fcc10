"""What is said about a LoRA: its kind, its numbers, its strength per block, and the picture of that."""

import numpy as np
import pytest
import torch
from lora_files import LAYOUTS, lora_file, lora_key, sdxl_shapes

from pit_core.lora.formats import load_lora, lora_from_tensors, match_report, save_lora
from pit_core.lora.info import block_norms, block_of, group_of, lora_info
from pit_core.lora.picture import COLOURS, HEAD, MAX_BLOCKS, lora_picture

SDXL, SDXL_IP = sdxl_shapes(shrink=32), sdxl_shapes(shrink=32, ip=True)
BLOCK = "up_blocks.0.attentions.1.transformer_blocks.0"


def kind(file):
    return match_report(file, SDXL).kind


def without(shapes, *endings):
    return {name: shape for name, shape in shapes.items() if not name.endswith(endings)}


def b4m(layout, published):
    """Halves frozen as published (the first half of `up` is zero where a layer is not square, and in to_out)
    or for a zero start (they live in different rank channels)."""
    file = lora_file(SDXL, layout=layout)
    for name, (out, width) in SDXL.items():
        down, up = file[lora_key(name, "down", layout)], file[lora_key(name, "up", layout)]
        if published and (out != width or name.endswith("to_out.0")):
            up[: out // 2] = 0
        elif not published:
            up[: out // 2, 2:] = 0
            down[:2, : width // 2] = 0
    return file


# kinds


def test_an_ip_lora_is_told_by_the_adapters_layers_or_by_its_form():
    assert {kind(lora_file(SDXL_IP, layout=layout)) for layout in LAYOUTS} == {"IP-LoRA"}
    assert kind(lora_file(SDXL)) == kind(lora_file(SDXL, alpha=4)) == "IP-LoRA"
    assert kind(lora_file({f"{BLOCK}.attn2.to_k_ip": (4, 8)})) == "IP-LoRA"


def test_a_b4m_file_is_told_by_its_prefix_or_by_its_frozen_halves():
    assert kind(lora_file(SDXL, layout="b4m")) == "B4M"
    for published in (True, False):
        assert kind(b4m("kohya", published)) == "B4M"
        assert kind({key: tensor.half() for key, tensor in b4m("released", published).items()}) == "B4M"


def test_everything_else_is_plain():
    assert kind(lora_file(without(SDXL, "to_out.0"))) == "plain"
    assert kind(lora_file(SDXL, alpha=2)) == "plain"
    assert kind(lora_file({**SDXL, "mid_block.attentions.0.proj_in": (4, 4)})) == "plain"
    mixed = lora_file(SDXL) | lora_file({f"{BLOCK}.attn1.to_q": SDXL[f"{BLOCK}.attn1.to_q"]}, rank=2)
    assert kind(mixed) == "plain"


def test_a_layer_that_does_nothing_is_no_sign_of_b4m():
    file = {key: torch.zeros_like(t) if ".up." in key else t for key, t in lora_file(SDXL).items()}
    assert kind(file) == "IP-LoRA"


def test_files_of_ours_say_their_kind_and_nonsense_there_is_ignored(tmp_path):
    few = lora_file({f"{BLOCK}.attn1.to_q": (4, 4)})
    for said, expected in (("B4M", "B4M"), ("virus", "plain")):
        save_lora(tmp_path / "a.safetensors", few, metadata={"pit_lora_kind": said})
        assert lora_info(load_lora(tmp_path / "a.safetensors")).kind == expected


# numbers


def test_the_numbers_at_a_glance():
    info = lora_info(lora_file(SDXL_IP, rank=2, alpha=1))
    assert (info.kind, info.layers, info.ranks, info.scales) == ("IP-LoRA", 700, {2: 700}, (0.5, 0.5))
    assert info.parameters == sum(2 * (out + width) for out, width in SDXL_IP.values())
    assert (
        str(info)
        == f"IP-LoRA, rank 2 (700 layers), scale 0.5, {info.parameters / 1e6:.3g} M parameters in float32"
    )
    assert [block.block for block in info.blocks] == [
        *(f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in (0, 1)),
        "mid_block",
        *(f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in (0, 1, 2)),
    ]
    assert sum(block.layers for block in info.blocks) == 700


def test_norms_are_those_of_the_changes_of_weight():
    shapes = {
        f"{BLOCK}.{name}": (6, 4) for name in ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_v_ip")
    }
    lora = lora_from_tensors(lora_file(shapes, alpha=-2) | lora_file({"conv_in": (3, 3)}))
    block, other = block_norms(lora)
    deltas = {name: layer.delta() for name, layer in lora.layers.items()}
    squares = {name: delta.norm().item() ** 2 for name, delta in deltas.items()}
    own = squares[f"{BLOCK}.attn1.to_q"] + squares[f"{BLOCK}.attn1.to_k"]
    assert block.norms["self-attention"] == pytest.approx(own**0.5, rel=1e-5)
    assert block.norms["image"] == pytest.approx(squares[f"{BLOCK}.attn2.to_v_ip"] ** 0.5, rel=1e-5)
    assert block.norm == pytest.approx((sum(squares.values()) - squares["conv_in"]) ** 0.5, rel=1e-5)
    assert (other.block, list(other.norms)) == ("conv_in", ["other"])


@pytest.mark.parametrize(
    ("module", "block", "group"),
    [
        ("mid_block.attentions.0.transformer_blocks.3.attn2.to_k", "mid_block", "text"),
        ("mid_block.attentions.0.transformer_blocks.3.attn2.to_k_ip", "mid_block", "image"),
        ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks.4", "self-attention"),
        ("down_blocks.1.resnets.0.conv1", "down_blocks.1", "other"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2", "other"),
    ],
)
def test_blocks_and_groups_of_layers(module, block, group):
    assert (block_of(module), group_of(module)) == (block, group)


# the picture


def test_bars_are_as_long_as_the_norms():
    names = [f"up_blocks.0.attentions.{i}.transformer_blocks.0.attn2.to_k" for i in (0, 1)]
    file = lora_file(dict.fromkeys(names, (6, 4)))
    for name in names:
        file[lora_key(name, "down", "released")] = file[lora_key(names[0], "down", "released")]
    file[lora_key(names[1], "up", "released")] = file[lora_key(names[0], "up", "released")] / 2
    bars = (np.asarray(lora_picture(file))[HEAD:] == COLOURS["text"]).all(-1).sum(1)
    long, short = sorted(set(bars) - {0}, reverse=True)
    assert long > 300 and short == pytest.approx(long / 2, abs=1)


def test_pictures_of_anything_have_a_sane_size():
    picture = lora_picture(lora_file(SDXL_IP))
    assert picture.mode == "RGB" and picture.width == 720 and 300 < picture.height < 700
    many = lora_picture(lora_file({f"layer{i}_{'x' * 100}.to_q": (2, 2) for i in range(3 * MAX_BLOCKS)}))
    assert many.height < 1500
    nothing = {f"{BLOCK}.attn1.to_q": (2, 2)}
    empty = {key: torch.zeros_like(tensor) for key, tensor in lora_file(nothing).items()}
    assert not (np.asarray(lora_picture(empty))[HEAD:] == COLOURS["self-attention"]).all(-1).any()
