"""Directions as nodes: the library's numbers, files that are found again, sweeps from one noise."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benches import CONTEXT, TOKENS, VISION, Bench, RealBench, randn

FOLDERS = ("models/ip_directions", "output/ip_directions")


@pytest.fixture(scope="module")
def models(bench: Bench) -> dict[str, Any]:
    return {"ip_adapter": bench.adapter(), "clip_vision": bench.clip_vision()}


@pytest.fixture(autouse=True)
def clean_directions(bench: Bench) -> Iterator[None]:
    yield
    for name in FOLDERS:
        shutil.rmtree(bench.folder / name, ignore_errors=True)
        (bench.folder / name).mkdir(parents=True)


def direction(bench: Bench, seed: int = 0, shape: tuple[int, ...] = (TOKENS, CONTEXT), **options: Any) -> Any:
    made = bench.part("pit_core.directions.direction").Direction
    return made(randn(shape, seed), **{"names": ("thin", "wide"), **options})


def images(count: int, low: float = 0.0, seed: int = 0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return low + 0.4 * torch.rand((count, 40, 30, 3), generator=chance)


def text(done: Any) -> str:
    shown = done.ui if isinstance(done.ui, dict) else done.ui.as_dict()
    return shown["text"][0]


def latent(rows: int = 1) -> dict[str, Any]:
    return {"samples": torch.zeros(rows, 4, 8, 8)}


# find


def test_a_direction_between_images_is_the_librarys(bench: Bench, models: dict[str, Any]) -> None:
    piles = {"first_images": images(9), "second_images": images(9, 0.6, seed=1)}
    done = bench.run(
        "PiTFindDirection", method="mean", **piles, **models, first_name="dark", second_name="light"
    )
    tokens = [
        bench.first("PiTEncodeImage", **models, image=pile, fit="pad").tokens for pile in piles.values()
    ]
    assert torch.allclose(done[0].vector, tokens[1].mean(0) - tokens[0].mean(0), atol=1e-5)
    assert done[0].adapter == models["ip_adapter"].adapter.content_hash
    assert done[1] == text(done) and done[1].startswith("dark to light: 4 IP tokens of width 32")
    assert done[0].evidence.accuracy > 0.9


def test_a_direction_between_tokens_needs_no_models(bench: Bench) -> None:
    """Pictures side by side count one by one."""
    first, second = bench.tokens(1, rows=3, count=2 * TOKENS), bench.tokens(2, rows=8)
    done = bench.run("PiTFindDirection", method="mean", first_tokens=first, second_tokens=second)
    piles = [each.tokens.reshape(-1, TOKENS, CONTEXT).mean(0) for each in (first, second)]
    assert torch.allclose(done[0].vector, piles[1] - piles[0], atol=1e-5)
    assert "found from 6 and 8 pictures" in done[1] and "below 8 a side" in done[1]


def test_what_cannot_be_found_is_one_sentence(bench: Bench, models: dict[str, Any]) -> None:
    tokens = bench.tokens(1, rows=8)
    for inputs, words in (
        ({}, "The first pile is empty"),
        ({"first_tokens": tokens}, "The second pile is empty"),
        ({"first_tokens": tokens, "second_tokens": tokens}, "the same mean"),
        ({"first_images": images(2)}, "Images need ip_adapter"),
        ({"first_images": images(2), "ip_adapter": models["ip_adapter"]}, "Images need clip_vision"),
        ({"first_tokens": tokens, "second_tokens": "x"}, "second_tokens is str"),
        ({"first_tokens": tokens, "second_tokens": tokens, "space": "CLIP features"}, "not tokens"),
        (
            {"first_tokens": bench.tokens(1, adapter="a"), "second_tokens": bench.tokens(2, adapter="b")},
            "different",
        ),
    ):
        with pytest.raises(bench.error, match=words):
            bench.run("PiTFindDirection", **inputs)


# files


def test_saved_directions_come_back_and_are_numbered(bench: Bench) -> None:
    for seed in (1, 2):
        told = text(bench.run("PiTSaveDirection", direction=direction(bench, seed), filename_prefix="a/wide"))
        assert told == f"Saved thin to wide: 4 IP tokens of width 32 as a/wide_0000{seed}_.safetensors"
    node = bench.pack.NODE_CLASS_MAPPINGS["PiTLoadDirection"]
    options = [name.replace(os.sep, "/") for name in node.define_schema().inputs[0].options]
    assert options[-2:] == ["a/wide_00001_.safetensors", "a/wide_00002_.safetensors"]
    done = bench.run("PiTLoadDirection", file=options[-1])
    assert torch.equal(done[0].vector, direction(bench, 2).vector)
    assert done[1] == text(done) and "thin to wide" in done[1]


def test_a_released_tensor_is_read_and_a_changed_file_read_again(bench: Bench) -> None:
    path = bench.folder / "models/ip_directions/muscular/ip_direction.pt"
    path.parent.mkdir(parents=True)
    torch.save(randn((1, TOKENS, CONTEXT), 5), path)
    name = "muscular/ip_direction.pt"
    done = bench.run("PiTLoadDirection", file=name)
    assert torch.equal(done[0].vector, randn((1, TOKENS, CONTEXT), 5)[0])
    assert "does not say what it was found from" in done[1]
    node = bench.pack.NODE_CLASS_MAPPINGS["PiTLoadDirection"]
    before = node.fingerprint_inputs(file=name)
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(file=name) not in (before, "")


@pytest.mark.parametrize("name", ["../out", "/abs", "a/../../b", "~/x", "C:\\x", "nul", ""])
def test_names_that_lead_elsewhere_are_refused(bench: Bench, name: str) -> None:
    with pytest.raises(bench.error):
        bench.run("PiTSaveDirection", direction=direction(bench), filename_prefix=name)
    with pytest.raises(bench.error):
        bench.run("PiTLoadDirection", file=name)
    assert not list(bench.folder.rglob("*ip_directions/**/*.safetensors"))


def test_the_miniatures_directions_are_always_listed(bench: Bench, shipped: Path) -> None:
    node = bench.pack.NODE_CLASS_MAPPINGS["PiTLoadDirection"]
    names = node.define_schema().inputs[0].options
    assert names == [f"miniature: {name}" for name in ("thin to wide", "flat to sketch", "plain to night")]
    with pytest.raises(bench.error, match="'miniature: thin to wide' is missing from this installation"):
        bench.run("PiTLoadDirection", file=names[0])
    own = direction(bench, 3)
    (shipped / "directions").mkdir()
    bench.part("pit_core.directions.checkpoint").save_direction(
        shipped / "directions/thin_to_wide.safetensors", own
    )
    assert torch.equal(bench.first("PiTLoadDirection", file=names[0]).vector, own.vector)
    assert node.fingerprint_inputs(file=names[0]) == ""
    with pytest.raises(bench.error, match="There is no file 'miniature: tall to small'"):
        bench.run("PiTLoadDirection", file="miniature: tall to small")


# edit


def test_tokens_move_along_directions_at_once_or_one_after_the_other(bench: Bench) -> None:
    tokens, one, two = bench.tokens(1, rows=2), direction(bench, 1), direction(bench, 2)
    both = bench.first("PiTEditTokens", tokens=tokens, direction=one, step=-0.5, direction3=two, step3=2.0)
    assert torch.allclose(both.tokens, tokens.tokens - 0.5 * one.vector + 2 * two.vector, atol=1e-5)
    assert torch.equal(both.null, tokens.null)
    first = bench.first("PiTEditTokens", tokens=tokens, direction=one, step=-0.5)
    second = bench.first("PiTEditTokens", tokens=first, direction=two, step=2.0)
    assert torch.allclose(second.tokens, both.tokens, atol=1e-5)
    inputs = {"tokens": tokens, "direction": one, "direction2": two, "orthogonal": True}
    bent = [
        bench.first("PiTEditTokens", **inputs, step=a, step2=b).tokens - tokens.tokens
        for a, b in ((1.0, 0.0), (0.0, 1.0))
    ]
    assert abs(float((bent[0][0] * bent[1][0]).sum())) < 1e-3


def test_only_masked_tokens_move(bench: Bench) -> None:
    tokens = bench.tokens(1)
    found = bench.first("PiTEditTokens", tokens=tokens, direction=direction(bench), token_mask="1-2")
    moved = (found.tokens != tokens.tokens).any(-1)[0]
    assert moved.tolist() == [False, True, True, False]


def test_a_direction_in_clip_features_goes_through_the_projection(
    bench: Bench, models: dict[str, Any]
) -> None:
    piles = {"first_images": images(9), "second_images": images(9, 0.6, seed=1)}
    found = bench.first("PiTFindDirection", space="CLIP features", method="mean", **piles, **models)
    assert found.vector.shape[-1] == VISION and found.vector.ndim == 2
    image = images(2, 0.2, seed=2)
    tokens = bench.first("PiTEncodeImage", **models, image=image)
    edited = bench.first("PiTEditTokens", tokens=tokens, direction=found, step=0.5, **models, image=image)
    pixels = bench.part("pit_core.ip_adapter.pixels").preprocess(image, size=32)
    states, _ = bench.host.HostEncoder(models["clip_vision"])(pixels)
    project = bench.part("pit_core.ip_adapter.encode").tokens_from_features
    expected = project(models["ip_adapter"].adapter, states + 0.5 * found.vector)
    assert torch.allclose(edited.tokens, expected, atol=1e-4)
    with pytest.raises(bench.error, match="give the picture"):
        bench.run("PiTEditTokens", tokens=tokens, direction=found)
    with pytest.raises(bench.error, match="need ip_adapter"):
        bench.run("PiTEditTokens", tokens=tokens, direction=found, image=image)
    with pytest.raises(bench.error, match="one picture per row"):
        bench.run("PiTEditTokens", tokens=tokens, direction=found, **models, image=image[:1])


def test_another_adapters_direction_is_told(bench: Bench) -> None:
    odd = direction(bench, adapter="a" * 64)
    assert bench.run("PiTEditTokens", tokens=bench.tokens(1, adapter="a" * 64), direction=odd).ui is None
    told = text(bench.run("PiTEditTokens", tokens=bench.tokens(1, adapter="b" * 64), direction=odd))
    assert "was found with adapter aaaaaaaa" in told


def test_edits_that_make_no_sense(bench: Bench) -> None:
    tokens = bench.tokens(1)
    for inputs, words in (
        ({"direction": direction(bench, shape=(16, CONTEXT))}, "moves 16 tokens"),
        ({"direction": tokens}, "direction is IPTokens"),
        ({"direction": direction(bench), "direction2": "x"}, "direction2 is str"),
        ({"direction": direction(bench), "step": float("nan")}, "finite step"),
        ({"direction": direction(bench), "token_mask": "9"}, "numbered 0 to 3"),
        (
            {"direction": direction(bench), "direction2": direction(bench), "orthogonal": True},
            "leave one out",
        ),
    ):
        with pytest.raises(bench.error, match=words):
            bench.run("PiTEditTokens", tokens=tokens, **inputs)


# sweep


def test_a_sweep_has_a_picture_for_each_step_of_each_row(bench: Bench) -> None:
    tokens, along = bench.tokens(1, rows=2), direction(bench)
    done = bench.run("PiTSweepDirection", tokens=tokens, direction=along, latent=latent(), steps="-1, 0, 2")
    expected = [row + step * along.vector for row in tokens.tokens for step in (-1, 0, 2)]
    assert torch.allclose(done[0].tokens, torch.stack(expected), atol=1e-5)
    assert done[1]["samples"].shape == (6, 4, 8, 8) and done[1]["batch_index"] == [0, 0, 0, 1, 1, 1]
    assert done[2] == "step -1\nstep 0\nstep +2"


def test_masks_and_numbers_of_latents_go_along(bench: Bench) -> None:
    given = {"samples": randn((2, 4, 8, 8), 1), "noise_mask": randn((2, 1, 8, 8), 2), "batch_index": [5, 9]}
    inputs = {"tokens": bench.tokens(1, rows=2), "direction": direction(bench), "steps": "0 1"}
    found = bench.run("PiTSweepDirection", **inputs, latent=given)[1]
    assert found["batch_index"] == [5, 5, 9, 9]
    for name in ("samples", "noise_mask"):
        assert torch.equal(found[name], given[name].repeat_interleave(2, dim=0))
    for odd, count in ((latent(3), "3 latents"), ({}, "no latents"), (None, "no latents")):
        with pytest.raises(bench.error, match=count):
            bench.run("PiTSweepDirection", **inputs, latent=odd)
    with pytest.raises(bench.error, match="Steps are numbers"):
        bench.run("PiTSweepDirection", **{**inputs, "steps": "a"}, latent=latent())


def test_all_steps_start_from_one_noise(real: RealBench) -> None:
    import comfy.sample

    inputs = {"tokens": real.tokens(1, rows=2), "direction": direction(real), "steps": "0 1"}
    made = real.run("PiTSweepDirection", **inputs, latent=latent())[1]
    noise = comfy.sample.prepare_noise(made["samples"], 7, made["batch_index"])
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[2], noise[3])
    assert not torch.equal(noise[0], noise[2])


def test_a_sweep_is_laid_out_on_one_sheet(bench: Bench) -> None:
    pictures = images(6)
    done = bench.run(
        "PiTSweepGrid", images=pictures, labels="step -1\nstep 0\nstep +1\n", title="thin to wide"
    )
    assert done[0].shape[0] == 1 and done[0].shape[-1] == 3 and done[0].shape[2] > 3 * 192
    for labels, words in (("", "labels is empty"), ("a\nb\nc\nd", "a multiple")):
        with pytest.raises(bench.error, match=words):
            bench.run("PiTSweepGrid", images=pictures, labels=labels)


# preview


def test_the_preview_compares_directions(bench: Bench) -> None:
    several = {"direction0": direction(bench, 1), "direction1": direction(bench, 2, names=("a", "b"))}
    done = bench.run("PiTPreviewDirection", directions={**several, "direction2": None})
    assert done[0].shape[0] == 1 and done[1] == text(done)
    assert "thin to wide and a to b: cosine" in done[1]
    for directions, words in (({}, "is empty"), (None, "is empty"), ({"direction0": 3}, "direction0 is int")):
        with pytest.raises(bench.error, match=words):
            bench.run("PiTPreviewDirection", directions=directions)


# with the rest


def test_what_a_prior_made_is_edited_and_drawn(bench: Bench, models: dict[str, Any]) -> None:
    prior = bench.first("PiTLoadPrior", file=bench.prior_file())
    concepts = bench.first("PiTSamplePrior", prior=prior, parts=bench.tokens(1), steps=2)
    edited = bench.first("PiTEditTokens", tokens=concepts, direction=direction(bench), step=1.0)
    assert torch.allclose(edited.tokens, concepts.tokens + direction(bench).vector, atol=1e-5)
    drawn = [
        bench.sample(
            bench.first("PiTApplyTokens", model=bench.model(), ip_adapter=models["ip_adapter"], tokens=tokens)
        )
        for tokens in (concepts, edited)
    ]
    assert torch.isfinite(drawn[1]).all() and not torch.equal(*drawn)
