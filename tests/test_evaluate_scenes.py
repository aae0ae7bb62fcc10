"""The scenes table on an untrained stack, with a LoRA that changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_stack
import torch
from PIL import Image

from pit_core.concepts import Stack
from pit_core.errors import PitError
from pit_core.evaluate import scenes
from pit_core.evaluate.scenes import WEIGHTS, Row, table
from pit_core.ip_adapter.layers import layers_of_unet
from pit_core.lora.model import Lora, LoraLayer
from pit_core.miniature.critters import SCENES, is_held_out
from pit_core.miniature.data import labels_of
from pit_core.miniature.pairs import drawn_pair, pair_critter, pair_prompt


def _lora(stack: Stack, up: float) -> Lora:
    """On the queries of the cross-attention layers."""
    layers = {}
    for layer in layers_of_unet(stack.renderer.unet):
        module = f"{layer.module}.to_q"
        width = stack.renderer.unet.get_submodule(module).in_features
        down = torch.ones(2, width) / width
        layers[module] = LoraLayer(module, down, torch.full((layer.width, 2), up), 2)
    return Lora(layers, name="a LoRA")


def test_pairs_show_the_same_critter_twice_and_the_prompt_says_the_rest() -> None:
    for index in range(6):
        critter = pair_critter("scene", 3, index)
        (target, labels), (reference, plain) = drawn_pair("scene", critter)
        assert critter.scene != "plain" and not is_held_out(critter)
        assert (labels == labels_of(critter)).all() and (
            plain == labels_of(replace(critter, scene="plain"))
        ).all()
        assert target.shape == reference.shape == (128, 128, 3)
        assert (reference[:4, :4] == 255).all() and not (target[:4, :4] == 255).all()
        assert pair_prompt("scene", critter).startswith("a critter, in a ")
    sheet, _ = drawn_pair("sheet", pair_critter("sheet", 3, 0))[0]
    corners = [sheet[:38, :38], sheet[:38, -38:], sheet[40:90, 40:90], sheet[-26:, :40]]
    assert all(corner.min() < 150 for corner in corners), "a view is missing"
    assert pair_prompt("sheet", critter).startswith("a character sheet")


def test_a_run_compares_weights_and_the_lora_on_the_same_noise(
    stack: Stack, judge: torch.nn.Module, tmp_path: Path
) -> None:
    rows = scenes.run(stack, judge, _lora(stack, 0.0), count=3, seed=1, out=tmp_path / "new")
    assert [row.weight for row in rows] == [*WEIGHTS, 1.0]
    assert [row.method for row in rows] == ["adapter alone"] * 5 + ["with the IP-LoRA"]
    assert all(0 <= row.followed <= 1 and 0 <= row.kept <= 1 for row in rows)
    record = json.loads((tmp_path / "new" / "scenes.json").read_text())
    assert [Row(**row) for row in record["rows"]] == rows
    text = (tmp_path / "new" / "scenes.txt").read_text().splitlines()
    assert "\n".join(text[1:]) == table(rows) and len({len(line) for line in text[1:]}) == 1
    with Image.open(tmp_path / "new" / "scenes.png") as grid:
        assert grid.width > 6 * 128
    assert scenes.run(stack, judge, _lora(stack, 0.0), count=3, seed=1) == rows


def test_the_lora_counts_in_its_own_row_alone(stack: Stack) -> None:
    critters = [pair_critter("scene", 9, index) for index in range(2)]
    tokens = [torch.zeros(tiny_stack.TOKENS, tiny_stack.CONTEXT)] * 2

    def drawn(method: scenes._Method) -> list[bytes]:
        return [image.tobytes() for image in scenes._drawn(stack, method, critters, tokens, [1, 2])]

    *_, alone, lora = scenes._methods(stack.defaults, _lora(stack, 5.0))
    before, under, after = drawn(alone), drawn(lora), drawn(alone)
    assert before == after
    without = drawn(replace(lora, lora=None))
    assert under != without


def test_scenes_are_all_but_the_plain_one() -> None:
    found = {pair_critter("scene", 1, index).scene for index in range(100)}
    assert found == set(SCENES[1:])


def test_a_count_out_of_range_is_told_in_a_sentence(stack: Stack, judge: torch.nn.Module) -> None:
    with pytest.raises(PitError, match="the count as a whole number"):
        scenes.run(stack, judge, _lora(stack, 0.0), count=0)
