"""Pictures in, tokens out: the same numbers as without ComfyUI, each picture encoded once."""

from typing import Any

import pytest
import torch
from benches import CONTEXT, TOKENS, VISION, Bench, DoubleBench, randn
from torch import Tensor


@pytest.fixture(scope="module")
def models(bench: Bench) -> dict[str, Any]:
    return {"ip_adapter": bench.adapter(), "clip_vision": bench.clip_vision()}


def pictures(count: int = 1, height: int = 40, width: int = 60, seed: int = 1) -> Tensor:
    return torch.rand((count, height, width, 3), generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, atol=1e-5)


def test_the_loader_reports_what_a_file_is(bench: Bench) -> None:
    report = bench.run("PiTLoadIPAdapter", file=bench.adapter_file("renamed.safetensors"))[1]
    assert "IP-Adapter Plus, 4 tokens" in report and f"width {VISION}" in report


def test_tokens_are_those_of_the_library(bench: Bench, models: dict[str, Any]) -> None:
    """Pixels by pit_core, features by the host's encoder, tokens by the adapter on torch's own layers."""
    pixels = bench.part("pit_core.ip_adapter.pixels").preprocess(pictures(2), size=32)
    encode = bench.part("pit_core.ip_adapter.encode")
    path = bench.folder / "models/ipadapter" / bench.adapter_file()
    adapter = bench.part("pit_core.ip_adapter.checkpoint").load_ip_adapter(path)
    states, _ = bench.host.HostEncoder(models["clip_vision"])(pixels)
    expected = encode.tokens_from_features(adapter, states)
    found = bench.first("PiTEncodeImage", **models, image=pictures(2))
    assert found.tokens.shape == (2, TOKENS, CONTEXT)
    assert close(found.tokens, expected)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fits_differ_on_oblong_pictures_alone(bench: Bench, models: dict[str, Any], fit: str) -> None:
    def tokens(image: Tensor, how: str) -> Tensor:
        return bench.first("PiTEncodeImage", **models, image=image, fit=how).tokens

    others = [how for how in ("crop", "pad", "stretch") if how != fit]
    square = pictures(1, 48, 48)
    assert all(close(tokens(square, fit), tokens(square, other)) for other in others)
    assert not any(close(tokens(pictures(), fit), tokens(pictures(), other)) for other in others)


def test_the_null_is_a_choice(bench: Bench, models: dict[str, Any]) -> None:
    nulls = {
        kind: bench.first("PiTEncodeImage", **models, image=pictures(), null=kind)
        for kind in ("as trained", "grey", "black", "white")
    }
    assert torch.equal(nulls["as trained"].null, nulls["grey"].null)
    assert not close(nulls["grey"].null, nulls["black"].null)
    assert torch.equal(nulls["white"].null, nulls["black"].white)
    white = bench.first("PiTEncodeImage", **models, image=torch.ones(1, 8, 8, 3))
    assert close(white.tokens, white.white)


def test_chunks_change_nothing(bench: Bench, models: dict[str, Any]) -> None:
    image = pictures(5, seed=3)
    whole = bench.first("PiTEncodeImage", **models, image=image, chunk=5).tokens
    fresh = {**models, "clip_vision": bench.clip_vision()}
    assert close(bench.first("PiTEncodeImage", **fresh, image=image, chunk=2).tokens, whole)


def test_each_picture_is_encoded_once(double: DoubleBench, models: dict[str, Any]) -> None:
    encoder = double.clip_vision()
    inputs = {"ip_adapter": models["ip_adapter"], "clip_vision": encoder}
    double.first("PiTEncodeImage", **inputs, image=pictures(5, seed=4), chunk=2)
    assert encoder.model.calls[:3] == [2, 2, 1]
    before = len(encoder.model.calls)
    double.first("PiTEncodeImage", **inputs, image=pictures(6, seed=4)[:5])
    assert len(encoder.model.calls) == before
    double.first("PiTEncodeImage", **inputs, image=torch.cat([pictures(5, seed=4), pictures(2, seed=5)]))
    assert encoder.model.calls[before:] == [2]


def test_a_mask_turns_the_rest_to_white_paper(bench: Bench, models: dict[str, Any]) -> None:
    image = pictures(2)
    mask = torch.zeros(1, 40, 60)
    mask[:, :, 20:40] = 1
    expected = torch.where(mask[..., None] > 0, image, torch.ones(()))
    found = bench.first("PiTEncodeImage", **models, image=image, mask=mask)
    assert close(found.tokens, bench.first("PiTEncodeImage", **models, image=expected).tokens)


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures(bench: Bench, models: dict[str, Any], channels: int) -> None:
    image = pictures()[..., :1].repeat(1, 1, 1, channels)
    plain = image if channels == 1 else image[..., :3] * image[..., 3:] + 1 - image[..., 3:]
    found = bench.first("PiTEncodeImage", **models, image=image).tokens
    expected = bench.first("PiTEncodeImage", **models, image=plain.expand(-1, -1, -1, 3)).tokens
    assert torch.allclose(found, expected, atol=0.05)


@pytest.mark.parametrize("size", [(1, 1), (1, 4096), (33, 7)])
def test_odd_sizes(bench: Bench, models: dict[str, Any], size: tuple[int, int]) -> None:
    assert torch.isfinite(bench.first("PiTEncodeImage", **models, image=pictures(1, *size)).tokens).all()


# parts


def test_parts_come_in_order_from_single_pictures_and_batches(bench: Bench, models: dict[str, Any]) -> None:
    a, b, c = pictures(3, seed=8).split(1)
    apart = bench.first("PiTEncodeParts", **models, parts={"part0": a, "part1": b, "part2": c, "part3": None})
    batch = bench.first("PiTEncodeParts", **models, parts={"part0": torch.cat([a, b, c])})
    assert apart.rows == 3 and torch.equal(apart.tokens, batch.tokens)


def test_parts_lie_on_white_squares(bench: Bench, models: dict[str, Any]) -> None:
    canvas = bench.part("pit_core.parts.canvas")
    images = bench.part("nodes.images")
    picture = images.to_pictures(pictures(), "image")[0]
    square = images.to_image(canvas.on_white_square(picture, 32))
    found = bench.first("PiTEncodeParts", **models, parts={"part0": pictures()})
    assert close(found.tokens, bench.first("PiTEncodeImage", **models, image=square).tokens)


def test_a_reference_is_encoded_beside_the_parts(bench: Bench, models: dict[str, Any]) -> None:
    one = bench.first("PiTEncodeParts", **models, parts={"part0": pictures()}, reference=pictures(1, seed=5))
    four = bench.first("PiTEncodeParts", **models, parts={"part0": pictures()}, reference=pictures(4, seed=5))
    assert one.reference.shape == (1, TOKENS, CONTEXT) and not close(one.reference, four.reference)
    with pytest.raises(bench.error, match="up to 4 pictures"):
        bench.run("PiTEncodeParts", **models, parts={"part0": pictures()}, reference=pictures(5))


def test_parts_as_sketches(bench: Bench, models: dict[str, Any]) -> None:
    dark = torch.zeros(1, 20, 20, 3)
    found, plain = (
        bench.first("PiTEncodeParts", **models, parts={"part0": dark}, as_sketch=sketch)
        for sketch in (True, False)
    )
    assert not close(found.tokens, plain.tokens)


@pytest.mark.parametrize("node", ["PiTEncodeParts", "PiTCombineTokens"])
def test_slots_that_grow_are_not_optional(bench: Bench, node: str) -> None:
    """ComfyUI 0.8 cannot read a graph whose growing slots are; those past the first are so anyway."""
    inputs = bench.pack.NODE_CLASS_MAPPINGS[node].define_schema().inputs
    templates = [entry.template for entry in inputs if getattr(entry, "template", None)]
    assert len(templates) == 1 and templates[0].min == 1 and not templates[0].input.optional


# embeds of another pack


def test_embeds_are_projected_and_never_taken_for_tokens(bench: Bench, models: dict[str, Any]) -> None:
    embeds = randn((2, 17, VISION), 3)
    adapter = models["ip_adapter"]
    found = bench.first(
        "PiTTokensFromEmbeds", ip_adapter=adapter, pos_embed=embeds, neg_embed=torch.zeros(2, 17, VISION)
    )
    expected = bench.part("pit_core.ip_adapter.encode").tokens_from_features(adapter.adapter, embeds)
    assert close(found.tokens, expected.cpu()) and found.null.shape == (1, TOKENS, CONTEXT)
    with pytest.raises(bench.error, match="tokens is Tensor, not IP tokens"):
        bench.run("PiTApplyTokens", model=bench.model(), ip_adapter=adapter, tokens=embeds)
    with pytest.raises(bench.error, match="pos_embed: .*width 32, but got the shape"):
        bench.run("PiTTokensFromEmbeds", ip_adapter=adapter, pos_embed=randn((1, TOKENS, 20), 1))
