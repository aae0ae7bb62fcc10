"""What users connect by mistake: one sentence each that names the input, and the next run is fine."""

import math
from typing import Any

import pytest
import torch
from benches import CONTEXT, TOKENS, VISION, Bench, randn

NAN = math.nan


@pytest.fixture(scope="module")
def models(bench: Bench) -> dict[str, Any]:
    return {"ip_adapter": bench.adapter(), "clip_vision": bench.clip_vision()}


@pytest.fixture(scope="module")
def model(bench: Bench) -> Any:
    return bench.model()


def refused(bench: Bench, words: str, node: str, **inputs: Any) -> None:
    with pytest.raises(bench.error, match=words) as error:
        bench.run(node, **inputs)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400 and text.endswith(".")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(0, 8, 8, 3), "image is an empty batch"),
        (torch.zeros(1, 8, 8, 2), "image has the shape"),
        (torch.zeros(8, 8), "image has the shape"),
        (torch.zeros(1, 0, 8, 3), "image has the shape"),
        (torch.zeros(1, 1, 8, 8, 3), "image has the shape"),
        (torch.full((1, 8, 8, 3), NAN), "image holds NaN"),
        ("a picture", "image is no image but str"),
    ],
)
def test_images(bench: Bench, models: dict[str, Any], image: Any, words: str) -> None:
    refused(bench, words, "PiTEncodeImage", **models, image=image)
    refused(bench, words.replace("image", "part1", 1), "PiTEncodeParts", **models, parts={"part1": image})


@pytest.mark.parametrize(
    "image",
    [
        torch.full((1, 8, 8, 3), 7.0),
        torch.full((1, 8, 8, 3), -7.0),
        torch.zeros(1, 8, 8, 3),
        torch.zeros(8, 8, 3),
        torch.full((1, 8, 8, 3), 200, dtype=torch.uint8),
        torch.zeros(1, 8, 8, 3, dtype=torch.float16),
    ],
)
def test_odd_images_that_are_fine(bench: Bench, models: dict[str, Any], image: Any) -> None:
    assert torch.isfinite(bench.first("PiTEncodeImage", **models, image=image).tokens).all()


def test_no_parts_and_transparent_parts(bench: Bench, models: dict[str, Any]) -> None:
    refused(bench, "parts is empty", "PiTEncodeParts", **models, parts={"part0": None})
    clear = torch.zeros(1, 8, 8, 4)
    refused(bench, "wholly transparent", "PiTEncodeParts", **models, parts={"part0": clear})
    white = torch.ones(1, 8, 8, 3)
    refused(bench, "this picture is white", "PiTEncodeParts", **models, parts={"p": white}, as_sketch=True)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(1, 2, 8, 8), "mask has the shape"),
        (torch.zeros(0, 8, 8), "mask has the shape"),
        (torch.full((1, 8, 8), NAN), "mask holds NaN"),
        ("mask", "mask is no mask but str"),
    ],
)
def test_masks(bench: Bench, models: dict[str, Any], model: Any, mask: Any, words: str) -> None:
    image = torch.zeros(1, 8, 8, 3)
    refused(bench, words, "PiTEncodeImage", **models, image=image, mask=mask)
    inputs = {"model": model, "ip_adapter": models["ip_adapter"], "tokens": bench.tokens(1)}
    refused(bench, words, "PiTApplyTokens", **inputs, mask=mask)


def test_masks_of_other_batches(bench: Bench, models: dict[str, Any], model: Any) -> None:
    image, masks = torch.zeros(3, 8, 8, 3), torch.ones(2, 8, 8)
    refused(bench, "mask has 2 rows, but image 3", "PiTEncodeImage", **models, image=image, mask=masks)
    inputs = {"model": model, "ip_adapter": models["ip_adapter"], "tokens": bench.tokens(1, rows=3)}
    refused(bench, "mask holds 2", "PiTApplyTokens", **inputs, rows="regions", mask=masks)
    refused(bench, "mask holds none", "PiTApplyTokens", **inputs, rows="regions")
    patched = bench.first("PiTApplyTokens", **{**inputs, "tokens": bench.tokens(1)}, mask=masks)
    with pytest.raises(bench.error, match="mask have 2 rows, but the batch has 3 pictures"):
        bench.sample(patched, noise=randn((3, 4, 8, 8), 1))


def test_tokens(bench: Bench, models: dict[str, Any], model: Any) -> None:
    inputs = {"model": model, "ip_adapter": models["ip_adapter"]}
    make = bench.part("pit_core.ip_adapter.tokens").IPTokens
    base = make(torch.zeros(1, 2, CONTEXT), 2)
    narrow = make(torch.zeros(1, TOKENS, 20), TOKENS)
    bare = make(torch.zeros(1, TOKENS, CONTEXT), TOKENS)
    long = bench.tokens(1, count=3 * TOKENS)
    refused(bench, "tokens come in 2s", "PiTApplyTokens", **inputs, tokens=base)
    refused(bench, "of width 20", "PiTApplyTokens", **inputs, tokens=narrow)
    refused(bench, "carry no null", "PiTApplyTokens", **inputs, tokens=bare)
    refused(
        bench, "negative_tokens come in 2s", "PiTApplyTokens", **inputs, tokens=bare, negative_tokens=base
    )
    refused(
        bench,
        "negative tokens have 12 tokens",
        "PiTApplyTokens",
        **inputs,
        tokens=bench.tokens(1),
        negative_tokens=long,
    )
    refused(bench, "tokens1 is Tensor", "PiTCombineTokens", tokens={"tokens1": torch.zeros(1, 4, 32)})
    refused(bench, "no tokens to combine", "PiTCombineTokens", tokens={})
    half = bench.tokens(1).with_tokens(bench.tokens(1).tokens.half())
    assert torch.isfinite(bench.sample(bench.first("PiTApplyTokens", **inputs, tokens=half))).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": NAN}, "weight to be a finite number"),
        ({"composition_weight": math.inf}, "composition_weight"),
        ({"start_at": 0.8, "end_at": 0.2}, "start_at and end_at"),
        ({"start_at": NAN}, "start_at and end_at"),
        ({"schedule": "layer map"}, "layer map is empty"),
        ({"schedule": "layer map", "layer_map": "99:1"}, "names layer 99"),
        ({"schedule": "steep"}, "schedule out of"),
    ],
)
def test_settings_of_apply(
    bench: Bench, models: dict[str, Any], model: Any, settings: dict[str, Any], words: str
) -> None:
    inputs = {"model": model, "ip_adapter": models["ip_adapter"], "tokens": bench.tokens(1)}
    refused(bench, words, "PiTApplyTokens", **inputs, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "at least 1 step"),
        ({"guidance": NAN}, "finite guidance"),
        ({"count": 0}, "count of at least 1"),
        ({"seed": 2**64}, "seed from 0"),
        ({"seed": -1}, "seed from 0"),
        ({"strength": 0.5}, "initial tokens"),
        ({"strength": NAN}, "strength from 0"),
        ({"solver": "rk4"}, "solver out of"),
    ],
)
def test_settings_of_the_prior(bench: Bench, settings: dict[str, Any], words: str) -> None:
    prior = bench.first("PiTLoadPrior", file=bench.prior_file())
    refused(bench, words, "PiTSamplePrior", prior=prior, parts=bench.tokens(1), **settings)
    bench.run("PiTSamplePrior", prior=prior, parts=bench.tokens(1), steps=1, seed=2**64 - 1)


def test_tokens_of_the_prior(bench: Bench) -> None:
    prior = bench.first("PiTLoadPrior", file=bench.prior_file())
    make = bench.part("pit_core.ip_adapter.tokens").IPTokens
    inputs = {"prior": prior, "parts": bench.tokens(1)}
    bare, narrow = make(torch.zeros(1, TOKENS, CONTEXT), TOKENS), make(torch.zeros(1, 2, CONTEXT), 2)
    refused(bench, "parts carries no white", "PiTSamplePrior", prior=prior, parts=bare)
    refused(bench, "parts holds 2 tokens", "PiTSamplePrior", prior=prior, parts=narrow)
    refused(bench, "initial holds 2 tokens", "PiTSamplePrior", **inputs, initial=narrow)
    rows = bench.tokens(2, rows=2)
    refused(bench, "initial holds 2 rows", "PiTSamplePrior", **inputs, initial=rows, count=3)
    with_reference = bench.tokens(1, reference=torch.zeros(1, TOKENS, CONTEXT))
    refused(bench, "without a reference slot", "PiTSamplePrior", prior=prior, parts=with_reference)
    refused(bench, "parts is Tensor", "PiTSamplePrior", prior=prior, parts=torch.zeros(1, 4, 32))


def test_encoders_and_models_that_do_not_belong(bench: Bench, models: dict[str, Any]) -> None:
    image = torch.zeros(1, 8, 8, 3)
    adapter = models["ip_adapter"]
    wide = bench.clip_vision(width=48, projection=VISION)
    refused(
        bench,
        "hidden states of width 48",
        "PiTEncodeImage",
        ip_adapter=adapter,
        clip_vision=wide,
        image=image,
    )
    refused(
        bench, "not a CLIP image", "PiTEncodeImage", ip_adapter=adapter, clip_vision=object(), image=image
    )
    refused(bench, "ip_adapter is str", "PiTEncodeImage", ip_adapter="x", clip_vision=wide, image=image)
    other = bench.adapter(name="other.safetensors", output_dim=24)
    narrow = bench.part("pit_core.ip_adapter.tokens").IPTokens(torch.zeros(1, 4, 24), 4)
    refused(
        bench, "pair it with its own", "PiTApplyTokens", model=bench.model(), ip_adapter=other, tokens=narrow
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!doctype html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (b"\xff" * 64, "neither a safetensors"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "header"),
    ],
)
def test_files(bench: Bench, content: bytes, words: str) -> None:
    for node, folder in (
        ("PiTLoadIPAdapter", "models/ipadapter"),
        ("PiTLoadPrior", "models/ip_prior"),
        ("PiTLoadTokens", "output/ip_tokens"),
    ):
        (bench.folder / folder / "bad.safetensors").write_bytes(content)
        refused(bench, words, node, file="bad.safetensors")
        refused(bench, "There is no file 'gone.safetensors'", node, file="gone.safetensors")


def test_files_of_another_kind(bench: Bench) -> None:
    (bench.folder / "models/ip_prior" / "a.safetensors").write_bytes(
        (bench.folder / "models/ipadapter" / bench.adapter_file()).read_bytes()
    )
    refused(bench, "an IP-Adapter, not an IP-Prior", "PiTLoadPrior", file="a.safetensors")
    (bench.folder / "models/ipadapter" / "b.safetensors").write_bytes(
        (bench.folder / "models/ip_prior" / bench.prior_file()).read_bytes()
    )
    refused(bench, "not an IP-Adapter", "PiTLoadIPAdapter", file="b.safetensors")
