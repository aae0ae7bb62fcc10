"""Combine, save, load and look at tokens."""

import os
from pathlib import Path

import pytest
import torch
from benches import Bench


def test_combining_is_the_librarys(bench: Bench) -> None:
    tokens = {"tokens0": bench.tokens(1), "tokens1": bench.tokens(2), "tokens2": None}
    found = bench.first("PiTCombineTokens", tokens=tokens, operation="average")
    assert torch.equal(found.tokens, (tokens["tokens0"].tokens + tokens["tokens1"].tokens) / 2)
    half = bench.first("PiTCombineTokens", tokens=tokens, operation="slerp", amount=0.0)
    assert torch.allclose(half.tokens, tokens["tokens0"].tokens, atol=1e-5)


def test_saved_tokens_come_back_and_are_numbered(bench: Bench) -> None:
    for seed in (1, 2):
        bench.run("PiTSaveTokens", tokens=bench.tokens(seed, rows=2), filename_prefix="heroes/knight")
    names = ["heroes/knight_00001_.safetensors", "heroes/knight_00002_.safetensors"]
    node = bench.pack.NODE_CLASS_MAPPINGS["PiTLoadTokens"]
    options = [name.replace(os.sep, "/") for name in node.define_schema().inputs[0].options]
    assert options == names
    for seed, name in zip((1, 2), names, strict=True):
        loaded = bench.first("PiTLoadTokens", file=name)
        assert loaded.content_hash() == bench.tokens(seed, rows=2).content_hash()


def test_a_changed_file_is_read_again(bench: Bench) -> None:
    node = bench.pack.NODE_CLASS_MAPPINGS["PiTLoadTokens"]
    bench.run("PiTSaveTokens", tokens=bench.tokens(1))
    name = "tokens_00001_.safetensors"
    before = node.fingerprint_inputs(file=name)
    assert before == node.fingerprint_inputs(file=name) != ""
    path = bench.folder / "output/ip_tokens" / name
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs(file=name) != before
    path.unlink()
    assert node.fingerprint_inputs(file=name) == "missing"
    assert node.fingerprint_inputs(file=None) == ""


def test_models_may_be_links_and_tokens_may_not(bench: Bench, tmp_path: Path) -> None:
    """A disk of models elsewhere is usual, and listed by the host; tokens lie where workflows write."""
    for node, folder, name in (
        ("PiTLoadIPAdapter", "models/ipadapter", bench.adapter_file("here.safetensors")),
        ("PiTLoadPrior", "models/ip_prior", bench.prior_file("here.safetensors")),
    ):
        elsewhere = tmp_path / folder
        elsewhere.mkdir(parents=True)
        (bench.folder / folder / name).rename(elsewhere / name)
        (bench.folder / folder / "disk").symlink_to(elsewhere, target_is_directory=True)
        (bench.folder / folder / "one.safetensors").symlink_to(elsewhere / name)
        for file in ("one.safetensors", f"disk/{name}"):
            assert bench.run(node, file=file)
            assert bench.pack.NODE_CLASS_MAPPINGS[node].fingerprint_inputs(file=file) != "missing"
    bench.run("PiTSaveTokens", tokens=bench.tokens(1))
    tokens = bench.folder / "output/ip_tokens"
    (tokens / "tokens_00001_.safetensors").rename(tmp_path / "outside.safetensors")
    (tokens / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(bench.error, match="leads out of the folder"):
        bench.run("PiTLoadTokens", file="link.safetensors")


@pytest.mark.parametrize("prefix", ["../out", "/abs", "a/../../b", "~/x", "C:\\x", "a\\b", "nul", "a\0b", ""])
def test_names_that_lead_elsewhere_are_refused(bench: Bench, prefix: str) -> None:
    with pytest.raises(bench.error):
        bench.run("PiTSaveTokens", tokens=bench.tokens(1), filename_prefix=prefix)
    with pytest.raises(bench.error):
        bench.run("PiTLoadTokens", file=prefix)
    files = {path.name for path in bench.folder.rglob("*.safetensors")}
    assert not files


def test_the_preview_is_a_picture_and_a_line(bench: Bench) -> None:
    done = bench.run("PiTPreviewTokens", tokens=bench.tokens(1, rows=3))
    picture, summary = done[0], done[1]
    assert picture.shape[0] == 1 and picture.shape[-1] == 3 and 0 <= picture.min() <= picture.max() <= 1
    assert summary == "3 rows of 4 tokens, width 32"
