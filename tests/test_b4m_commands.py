"""`pit b4m`, as a user meets it: joined, taken apart, looked into, drawn."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_stack
import torch
from b4m_files import fill
from lora_files import lora_file, unet_shapes
from PIL import Image
from safetensors.torch import load_file, save_file

from pit_core.b4m.dials import load_source
from pit_core.b4m.factors import save_factors
from pit_core.b4m.projection import SplitAdapter

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """content, style (one basis), foreign (another one) and plain, for the UNet of `tiny_stack`."""
    folder, unet = tmp_path_factory.mktemp("loras"), tiny_stack.unet()
    for number, (name, basis) in enumerate((("content", 0), ("style", 0), ("foreign", 1))):
        adapter = SplitAdapter.new(unet, rank=4, seed=basis)
        fill(adapter, number)
        factors = {layer: (down / 4, up / 4) for layer, (down, up) in adapter.factors().items()}
        save_factors(folder / f"{name}.safetensors", factors, adapter.metadata())
    save_file(lora_file(unet_shapes(unet)), folder / "plain.safetensors")
    return folder


@pytest.fixture
def pair(folder: Path) -> list[Path]:
    return [folder / "content.safetensors", folder / "style.safetensors"]


def deltas(*files: Path) -> dict[str, torch.Tensor]:
    source = load_source(*files)
    return {name: layer.delta() for name, layer in source.join()[0].items()}


def test_two_files_become_one_that_any_loader_reads(run: Run, pair: list, tmp_path: Path) -> None:
    target = tmp_path / "joined.safetensors"
    code, text, errors = run("b4m", "merge", *pair, "--out", target)
    assert (code, errors) == (0, "")
    assert "'content.safetensors' and 'style.safetensors', splice, rank 4" in text
    content, style, joined = (load_file(path) for path in (*pair, target))
    assert joined.keys() == content.keys()
    for key, tensor in joined.items():
        assert torch.equal(tensor, (style if "lora_up" in key else content)[key])
    assert run("b4m", "merge", target, "--content", 0.5, "--dtype", "float16", "--out", target)[0] == 2
    weaker = tmp_path / "weaker.safetensors"
    assert run("b4m", "merge", target, "--content", 0.5, "--dtype", "float16", "--out", weaker)[0] == 0
    assert load_file(weaker)[key].dtype in (torch.float16, torch.float32)  # alpha stays


def test_four_gains_weigh_the_quadrants(run: Run, pair: list, tmp_path: Path) -> None:
    plain, four = tmp_path / "plain.safetensors", tmp_path / "four.safetensors"
    assert run("b4m", "merge", *pair, "--out", plain)[0] == 0
    code, text, _ = run("b4m", "merge", *pair, "--gains", "1,2,-1,0.5", "--out", four)
    assert code == 0 and "rank 8" in text
    before, after = deltas(plain), deltas(four)
    for name, delta in after.items():
        m, n = delta.shape[0] // 2, delta.shape[1] // 2
        gains = torch.ones_like(delta)
        gains[:m, n:], gains[m:, :n], gains[m:, n:] = 2, -1, 0.5
        torch.testing.assert_close(delta, gains * before[name])


def test_ordinary_loras_are_added_up_and_it_is_said(run: Run, folder: Path, tmp_path: Path) -> None:
    content = folder / "content.safetensors"
    for other, reason in (("foreign", "frozen halves differ"), ("plain", "frozen halves differ")):
        target = tmp_path / f"{other}.safetensors"
        code, text, errors = run("b4m", "merge", content, folder / f"{other}.safetensors", "--out", target)
        assert code == 0 and "sum, rank 8" in text
        assert "note: B4M does not apply, so the two LoRAs were added up" in errors and reason in errors
        one, two, total = deltas(content), deltas(folder / f"{other}.safetensors"), deltas(target)
        for name, delta in total.items():
            torch.testing.assert_close(delta, one[name] + two[name])


def test_an_entity_is_taken_apart(run: Run, pair: list, tmp_path: Path) -> None:
    joined = tmp_path / "joined.safetensors"
    assert run("b4m", "merge", *pair, "--out", joined)[0] == 0
    assert run("b4m", "split", joined, "--out", tmp_path / "parts")[0] == 0
    names = ("base", "content", "style", "both")
    parts = [deltas(tmp_path / f"parts/joined_{name}.safetensors") for name in names]
    for name, delta in deltas(joined).items():
        torch.testing.assert_close(sum(part[name] for part in parts), delta)


def test_files_are_looked_into(run: Run, folder: Path, pair: list) -> None:
    code, text, _ = run("b4m", "inspect", *pair)
    assert code == 0 and "made for each other: their frozen halves agree" in text
    assert text.count("seed 0") == 2 and "B4M, rank 4" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("mid_block")]
    assert len(rows) == 2 and all(float(row[1]) == 0 and float(row[2]) > 0 for row in rows)  # A C = 0
    hashes = {line.split("basis ")[1][:12] for line in text.splitlines() if "basis " in line}
    assert len(hashes) == 1
    assert "not made for each other" in run("b4m", "inspect", pair[0], folder / "foreign.safetensors")[1]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stack.save(tmp_path_factory.mktemp("models")).sdxl


def test_a_grid_is_drawn_over_content_and_style(run: Run, pair: list, sdxl: Path, tmp_path: Path) -> None:
    common = ["--prompt", "a photo", "--sdxl", sdxl, "--steps", 2, "--out", tmp_path]
    code, text, errors = run(
        "b4m", "sample", *pair, *common, "--content", "0,2", "--style", "-2,0,2", "--base", 0, "--count", 2
    )
    assert (code, errors) == (0, "") and "001-grid.png: content by row, style by column" in text
    assert len(list(tmp_path.glob("001-content-*.png"))) == 12

    def pixels(name: str) -> bytes:
        with Image.open(tmp_path / f"001-content-{name}.png") as image:
            return image.tobytes()

    untouched = pixels("0-style-0-seed-0")
    assert pixels("2-style-0-seed-0") == untouched  # the content has nothing to act through
    assert pixels("0-style-2-seed-0") != untouched and pixels("0-style-0-seed-1") != untouched
    assert pixels("2-style-2-seed-0") != pixels("0-style-2-seed-0")
    with Image.open(tmp_path / "001-grid.png") as grid:
        assert grid.width > 3 * 192 and grid.height > 4 * 192


def test_mistakes_are_one_sentence(run: Run, folder: Path, pair: list, tmp_path: Path) -> None:
    out, sample = tmp_path / "x.safetensors", ["sample", *pair, "--prompt", "x", "--out", tmp_path / "no"]
    (tmp_path / "page.safetensors").write_text("<html>", "utf-8")
    for arguments, words in [
        (["merge", *pair, pair[0], "--out", out], "one entity, got 3 files"),
        (["merge", *pair, "--out", tmp_path / "x.bin"], "name the file x.safetensors"),
        (["merge", *pair, "--out", pair[1]], "is one of the files being merged"),
        (["merge", *pair, "--gains", "1,2", "--out", out], "Expected --gains to be 4 numbers"),
        (["merge", *pair, "--gains", "1,1,1,1", "--style", 2, "--out", out], "--gains says everything"),
        (["merge", *pair, "--content", 0, "--style", 0, "--base", 0, "--out", out], "nothing to write"),
        (["merge", *pair, "--blocks", "up: 1 2 3 4", "--out", out], "Expected block weights"),
        (["merge", *pair, "--style", "nan", "--out", out], "Expected style to be a finite number"),
        (["merge", tmp_path / "page.safetensors", "--out", out], "page.safetensors"),
        (
            ["merge", pair[0], folder / "foreign.safetensors", "--gains", "1,1,1,1", "--out", out],
            "can only be added up",
        ),
        ([*sample, "--content", "much"], "Expected --content to be numbers"),
        ([*sample, "--count", 0], "a count from 1 to 1000"),
        ([*sample, "--count", 300, "--style", "1,2"], "Expected 1 to 400 pictures, got 600"),
        ([*sample, "--sdxl-config", tmp_path], "--sdxl-config goes with --sdxl"),
        ([*sample, "--sdxl", tmp_path / "gone"], "gone"),
    ]:
        code, _, errors = run("b4m", *arguments)
        last = errors.strip().splitlines()[-1]
        assert code == 2 and words in last and last.startswith("pit: ") and last.endswith("."), arguments
    assert not out.exists() and not (tmp_path / "no").exists()
