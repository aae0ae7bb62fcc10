"""What users connect by mistake: one sentence each that names the input, and the next run is fine."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benches import CONTEXT, PROJECTION, TOKENS, VISION, Bench, RealBench, fill, randn
from torch import nn

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
        (torch.cat([torch.zeros(1, 8, 8, 3), torch.full((1, 8, 8, 3), NAN)]), "image holds NaN"),
        (torch.full((1, 8, 8, 3), math.inf), "image holds NaN or infinite"),
        (torch.full((1, 8, 8, 3), 200), "image holds torch.int64"),
        ("a picture", "image is no image but str"),
        ([torch.zeros(1, 8, 8, 3), torch.zeros(1, 9, 9, 3)], "image is no image but list"),
    ],
)
def test_images(bench: Bench, models: dict[str, Any], image: Any, words: str) -> None:
    refused(bench, words, "PiTEncodeImage", **models, image=image)
    refused(bench, words.replace("image", "part1", 1), "PiTEncodeParts", **models, parts={"part1": image})
    parts = {"part0": torch.zeros(1, 8, 8, 3)}
    words = words.replace("image", "reference", 1)
    refused(bench, words, "PiTEncodeParts", **models, parts=parts, reference=image)


@pytest.mark.parametrize(
    "image",
    [
        torch.full((1, 8, 8, 3), 7.0),
        torch.full((1, 8, 8, 3), -7.0),
        torch.zeros(1, 8, 8, 3),
        torch.zeros(8, 8, 3),
        torch.full((1, 8, 8, 3), 200, dtype=torch.uint8),
        torch.zeros(1, 8, 8, 3, dtype=torch.float16),
        torch.zeros(1, 8, 8, 3, dtype=torch.float64),
        torch.zeros(1, 3, 8, 8).movedim(1, -1),
        torch.zeros(1, 1, 1, 3),
        torch.zeros(1, 1, 4096, 3),
        torch.zeros(1, 4096, 1, 4),
        torch.zeros(2, 7, 5, 1),
    ],
)
def test_odd_images_that_are_fine(bench: Bench, models: dict[str, Any], image: Any) -> None:
    rows = len(image) if image.ndim == 4 else 1
    for chunk in (0, 1, 10**9):
        found = bench.first("PiTEncodeImage", **models, image=image, chunk=chunk).tokens
        assert len(found) == rows and torch.isfinite(found).all()


def test_parts_of_all_sizes_and_kinds(bench: Bench, models: dict[str, Any]) -> None:
    parts = {
        "part0": torch.zeros(1, 20, 30, 3),
        "part1": torch.full((2, 8, 8, 4), 0.5),
        "part2": None,
        "part3": torch.zeros(1, 1, 64, 1),
        "part4": torch.zeros(9, 9, 3),
        "part5": torch.full((1, 8, 8, 3), 200, dtype=torch.uint8),
    }
    found = bench.first("PiTEncodeParts", **models, parts=parts).tokens
    assert len(found) == 6 and torch.isfinite(found).all()


def test_no_parts_and_transparent_parts(bench: Bench, models: dict[str, Any]) -> None:
    refused(bench, "parts is empty", "PiTEncodeParts", **models, parts={"part0": None})
    refused(bench, "parts is empty", "PiTEncodeParts", **models)
    refused(bench, "no tokens to combine", "PiTCombineTokens")
    clear = torch.zeros(1, 8, 8, 4)
    good = torch.zeros(1, 8, 8, 4)
    good[..., 3] = 1
    parts = {"part0": good, "part1": clear}
    refused(bench, "^part1: .*wholly transparent", "PiTEncodeParts", **models, parts=parts)
    parts = {"part0": good, "part1": torch.cat([good, clear])}
    refused(
        bench, r"^part1 \(picture 1 of the batch\): .*transparent", "PiTEncodeParts", **models, parts=parts
    )
    parts = {"part0": good, "p": torch.ones(1, 8, 8, 3)}
    refused(bench, "^p: .*this picture is white", "PiTEncodeParts", **models, parts=parts, as_sketch=True)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(1, 2, 8, 8), "mask has the shape"),
        (torch.zeros(0, 8, 8), "mask has the shape"),
        (torch.zeros(8), "mask has the shape"),
        (torch.full((1, 8, 8), NAN), "mask holds NaN"),
        ("mask", "mask is no mask but str"),
    ],
)
def test_masks(bench: Bench, models: dict[str, Any], model: Any, mask: Any, words: str) -> None:
    image = torch.zeros(1, 8, 8, 3)
    refused(bench, words, "PiTEncodeImage", **models, image=image, mask=mask)
    inputs = {"model": model, "ip_adapter": models["ip_adapter"], "tokens": bench.tokens(1)}
    refused(bench, words, "PiTApplyTokens", **inputs, mask=mask)


def test_odd_masks_that_are_fine(bench: Bench, models: dict[str, Any], model: Any) -> None:
    """Of any size, all of it or nothing, on a picture and on a model."""
    image = torch.rand(2, 9, 8, 3, generator=torch.Generator().manual_seed(1))
    white, plain = (
        bench.first("PiTEncodeImage", **models, image=each) for each in (torch.ones(2, 9, 8, 3), image)
    )
    inputs = {"model": model, "ip_adapter": models["ip_adapter"], "tokens": bench.tokens(1)}
    base, free = bench.sample(model), bench.sample(bench.first("PiTApplyTokens", **inputs))
    for make, tokens, latents in ((torch.zeros, white, base), (torch.ones, plain, free)):
        for mask in (
            make(9, 8),
            make(1, 9, 8),
            make(2, 9, 8)[:1],
            make(1, 1, 9, 8),
            make(1, 9, 8, 1),
            make(1, 3, 50),
            make(1, 1, 1),
            make(1, 9, 8, dtype=torch.bool),
            make(1, 9, 8, dtype=torch.float16),
            -make(1, 9, 8) if make is torch.zeros else 7 * make(1, 9, 8),
        ):
            found = bench.first("PiTEncodeImage", **models, image=image, mask=mask).tokens
            assert torch.allclose(found, tokens.tokens, atol=1e-5)
        patched = bench.first("PiTApplyTokens", **inputs, mask=mask)
        assert torch.allclose(bench.sample(patched), latents, rtol=1e-4, atol=1e-4 * float(base.abs().max()))


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
    refused(bench, "tokens1 come in 2s", "PiTCombineTokens", tokens={"tokens0": bare, "tokens1": base})
    refused(
        bench, "b are 12 to a row, a 4", "PiTCombineTokens", tokens={"a": bare, "b": long}, operation="add"
    )
    both = {"tokens": {"a": bare, "b": bare}, "operation": "slerp"}
    refused(bench, "amount", "PiTCombineTokens", **both, amount=NAN)
    for node in ("PiTSaveTokens", "PiTPreviewTokens"):
        refused(bench, "tokens is Tensor, not IP tokens", node, tokens=torch.zeros(1, 4, 32))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        other = bench.tokens(1).with_tokens(bench.tokens(1).tokens.to(dtype))
        assert torch.isfinite(bench.sample(bench.first("PiTApplyTokens", **inputs, tokens=other))).all()


@pytest.mark.parametrize(
    ("embeds", "words"),
    [
        (torch.full((1, 17, VISION), NAN), "features are not finite"),
        (torch.zeros(0, 17, VISION), "is empty"),
        (torch.zeros(1, 0, VISION), "is empty"),
        (torch.zeros(1, VISION), "got the shape"),
        (torch.zeros(()), "got the shape"),
        (torch.zeros(1, TOKENS, CONTEXT + 1), "got the shape"),
        ([torch.zeros(1, 17, VISION)], "is no tensor of embeds but list"),
        ({"pos": None}, "is no tensor of embeds but dict"),
    ],
)
def test_embeds(bench: Bench, models: dict[str, Any], embeds: Any, words: str) -> None:
    adapter = models["ip_adapter"]
    good = torch.zeros(1, 17, VISION, dtype=torch.float16)
    refused(bench, f"pos_embed.*{words}", "PiTTokensFromEmbeds", ip_adapter=adapter, pos_embed=embeds)
    inputs = {"ip_adapter": adapter, "pos_embed": good}
    refused(bench, f"neg_embed.*{words}", "PiTTokensFromEmbeds", **inputs, neg_embed=embeds)
    found, exact = (
        bench.first("PiTTokensFromEmbeds", ip_adapter=adapter, pos_embed=t).tokens
        for t in (good, good.float())
    )
    assert torch.equal(found, exact)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": NAN}, "weight to be a finite number"),
        ({"composition_weight": math.inf}, "composition_weight"),
        ({"start_at": 0.8, "end_at": 0.2}, "start_at and end_at"),
        ({"start_at": NAN}, "start_at and end_at"),
        ({"end_at": NAN}, "start_at and end_at"),
        ({"schedule": "layer map"}, "layer map is empty"),
        ({"schedule": "layer map", "layer_map": "0:nan"}, "layer map reads"),
        ({"schedule": "layer map", "layer_map": "0:1e999"}, "layer map reads"),
        ({"schedule": "layer map", "layer_map": "0:1, 0:2"}, "names layer 0 twice"),
        ({"schedule": "layer map", "layer_map": "\0" * 10**5}, "layer map reads"),
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
        "^clip_vision: .*hidden states of width 48",
        "PiTEncodeImage",
        ip_adapter=adapter,
        clip_vision=wide,
        image=image,
    )
    base = base_adapter(bench)
    refused(
        bench,
        "^clip_vision: .*image embeddings of width 20",
        "PiTEncodeImage",
        ip_adapter=base,
        clip_vision=wide,
        image=image,
    )
    assert (
        bench.first("PiTEncodeImage", ip_adapter=base, clip_vision=models["clip_vision"], image=image)
        .null.isfinite()
        .all()
    )
    refused(bench, "'zeros' belongs to base", "PiTEncodeImage", **models, image=image, null="zeros")
    refused(
        bench, "not a CLIP image", "PiTEncodeImage", ip_adapter=adapter, clip_vision=object(), image=image
    )
    refused(bench, "ip_adapter is str", "PiTEncodeImage", ip_adapter="x", clip_vision=wide, image=image)
    tokens = {"ip_adapter": adapter, "tokens": bench.tokens(1)}
    refused(bench, "^model is str, no diffusion model", "PiTApplyTokens", model="x", **tokens)
    flux = SimpleNamespace(model=SimpleNamespace(diffusion_model=nn.Linear(2, 2)))
    refused(bench, "^model: .*no text cross-attention", "PiTApplyTokens", model=flux, **tokens)
    refused(bench, "prior is str", "PiTSamplePrior", prior="x", parts=bench.tokens(1))
    other = bench.adapter(name="other.safetensors", output_dim=24)
    narrow = bench.part("pit_core.ip_adapter.tokens").IPTokens(torch.zeros(1, 4, 24), 4)
    refused(
        bench,
        "^model: .*pair it with its own",
        "PiTApplyTokens",
        model=bench.model(),
        ip_adapter=other,
        tokens=narrow,
    )


def base_adapter(bench: Bench) -> Any:
    """Four tokens out of the image embedding."""
    parts = {k: bench.part(f"pit_core.ip_adapter.{k}") for k in ("adapter", "resampler", "checkpoint")}
    widths = [layer.width for layer in bench.host.layers_of_model(bench.model())]
    projector = parts["resampler"].ImageProjection(PROJECTION, CONTEXT, 4)
    made = fill(parts["adapter"].IPAdapter(projector, parts["adapter"].IPLayers(widths, CONTEXT)))
    path = bench.folder / "models/ipadapter/base.safetensors"
    parts["checkpoint"].save_ip_adapter(path, made)
    return bench.first("PiTLoadIPAdapter", file=path.name)


def cut_short() -> bytes:
    entry = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    header = json.dumps(entry).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


class Code:
    """What an attacker's pickle does when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this file has run its code",)


def pickled(tmp_path: Path) -> bytes:
    torch.save({"image_proj": Code()}, tmp_path / "evil.bin")
    return (tmp_path / "evil.bin").read_bytes()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (cut_short(), "is cut short"),
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
        refused(bench, f"^file: .*{words}", node, file="bad.safetensors")
        for name in ("gone.safetensors", "BAD.safetensors", "bad.SAFETENSORS"):
            refused(bench, f"^file: There is no file '{name}'", node, file=name)


def test_pickles_with_code(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for node, folder in (("PiTLoadIPAdapter", "models/ipadapter"), ("PiTLoadPrior", "models/ip_prior")):
        (bench.folder / folder / "evil.bin").write_bytes(pickled(tmp_path))
        refused(bench, "loading it could run code", node, file="evil.bin")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: {**t, "image_proj.proj_in.bias": t["image_proj.proj_in.bias"] * NAN}, "holds NaN"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("ip_adapter")}, "no attention layers"),
        (lambda t: {k: v for k, v in t.items() if ".0.to_q" not in k}, "lacks 'image_proj"),
        (lambda t: {**t, "image_proj.latents": torch.zeros(1, 0, 64)}, "which no IP-Adapter has"),
        (lambda t: {"image_proj.proj.0.weight": torch.zeros(8, 512)}, "FaceID or InstantID"),
        (lambda t: {**t, "ip_adapter.1.to_k_lora.down.weight": torch.zeros(8, 8)}, "FaceID or InstantID"),
        (lambda t: {f"lora_unet_{k}": v for k, v in t.items()}, "is a LoRA"),
        (lambda t: {"double_blocks.0.processor.ip_adapter_k_proj.weight": torch.zeros(8, 8)}, "Flux"),
        (lambda t: {"a" * 10**4 + "\n": torch.zeros(1)}, "is something else"),
        (lambda t: {}, "is something else"),
    ],
)
def test_adapters_that_are_none(
    bench: Bench, spoil: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], words: str
) -> None:
    files = bench.part("pit_core.files")
    path = bench.folder / "models/ipadapter" / bench.adapter_file()
    tensors, metadata = files.load_tensors(path)
    files.save_tensors(path, spoil(tensors), metadata)
    refused(bench, words, "PiTLoadIPAdapter", file=path.name)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"tokens": torch.full((1, 4, 8), NAN)}, {}, "NaN"),
        ({"tokens": torch.zeros(1, 0, 8)}, {}, "is damaged"),
        ({"tokens": torch.zeros(4, 8)}, {}, "is damaged"),
        ({"tokens": torch.zeros(1, 4, 8, dtype=torch.int64)}, {}, "are not floats"),
        ({"tokens": torch.zeros(1, 4, 8), "null": torch.zeros(1, 2, 8)}, {}, "The null of IP tokens"),
        ({"tokens": torch.zeros(1, 4, 8)}, {"unit": "3"}, "is damaged"),
        ({"tokens": torch.zeros(1, 4, 8)}, {"version": "99"}, "newer than this release"),
        ({"tokens": torch.zeros(1, 4, 8)}, {"kind": "direction"}, "kind 'direction', not IP tokens"),
        ({"direction": torch.zeros(8)}, {}, "not IP tokens"),
    ],
)
def test_token_files_that_are_none(
    bench: Bench, tensors: dict[str, Any], metadata: dict[str, str], words: str
) -> None:
    path = bench.folder / "output/ip_tokens/odd.safetensors"
    bench.part("pit_core.files").save_tensors(path, tensors, {"kind": "ip_tokens", **metadata})
    refused(bench, words, "PiTLoadTokens", file=path.name)


def test_priors_that_are_none(bench: Bench) -> None:
    files = bench.part("pit_core.files")
    path = bench.folder / "models/ip_prior" / bench.prior_file()
    tensors, metadata = files.load_tensors(path)
    files.save_tensors(path, {**tensors, "x_embedder.weight": tensors["x_embedder.weight"] * NAN}, metadata)
    refused(bench, "holds NaN", "PiTLoadPrior", file=path.name)
    files.save_tensors(path, tensors, {**metadata, "pit_config": "{"})
    refused(bench, "settings that are not JSON", "PiTLoadPrior", file=path.name)
    files.save_tensors(path, tensors, {k: v for k, v in metadata.items() if k != "pit_config"})
    path.with_name("cfg.yaml").write_text("model: [", "utf-8")
    refused(bench, "cfg.yaml", "PiTLoadPrior", file=path.name)


def test_a_folder_that_cannot_be_written_and_a_full_disk(bench: Bench) -> None:
    resource = pytest.importorskip("resource")  # the system's limit on files stands for the full disk
    folder = bench.folder / "output/ip_tokens"
    tokens = bench.tokens(1, rows=50)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        refused(bench, "disk is full", "PiTSaveTokens", tokens=tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(folder.iterdir())
    shutil.rmtree(folder)
    folder.write_text("a file in the folder's place", "utf-8")
    try:
        refused(bench, "cannot be written", "PiTSaveTokens", tokens=tokens)
    finally:
        folder.unlink()
    bench.run("PiTSaveTokens", tokens=tokens)


def test_names_that_are_no_text(bench: Bench) -> None:
    """Half of a pair of UTF-16 words, which JSON may hold and no file system takes."""
    refused(
        bench, "file names cannot have", "PiTSaveTokens", tokens=bench.tokens(1), filename_prefix="a\ud800"
    )
    for node in ("PiTLoadIPAdapter", "PiTLoadPrior", "PiTLoadTokens"):
        refused(bench, "^file: ", node, file="a\ud800.safetensors")


@pytest.mark.parametrize("shape", [(1, 16, 8, 8), (1, 4, 1, 8, 8), (3, 4, 8, 8)])
def test_latents_of_another_kind(bench: Bench, models: dict[str, Any], shape: tuple[int, ...]) -> None:
    """16 channels, video, a batch that the tokens do not fit: the host's error, and the next run is fine."""
    if not isinstance(bench, RealBench):
        pytest.skip("the host checks latents")
    inputs = {"model": bench.model(), "ip_adapter": models["ip_adapter"]}
    patched = bench.first("PiTApplyTokens", **inputs, tokens=bench.tokens(1, rows=2))
    expected = bench.sample(patched, noise=randn((2, 4, 8, 8), 7))
    with pytest.raises((RuntimeError, ValueError, TypeError, bench.error)):
        bench.sample(patched, noise=randn(shape, 7))
    assert not any(each._kept for each in bench.host.applications_of(patched))
    assert torch.equal(bench.sample(patched, noise=randn((2, 4, 8, 8), 7)), expected)


def test_files_of_another_kind(bench: Bench) -> None:
    (bench.folder / "models/ip_prior" / "a.safetensors").write_bytes(
        (bench.folder / "models/ipadapter" / bench.adapter_file()).read_bytes()
    )
    refused(bench, "an IP-Adapter, not an IP-Prior", "PiTLoadPrior", file="a.safetensors")
    (bench.folder / "models/ipadapter" / "b.safetensors").write_bytes(
        (bench.folder / "models/ip_prior" / bench.prior_file()).read_bytes()
    )
    refused(bench, "not an IP-Adapter", "PiTLoadIPAdapter", file="b.safetensors")
