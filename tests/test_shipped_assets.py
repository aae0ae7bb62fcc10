"""Directions and IP-LoRAs of the miniature: how they are made, and how commands name them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_stack
from lora_files import lora_file, unet_shapes

from pit_core.commands.common import with_shipped
from pit_core.concepts import Stack, StackFiles
from pit_core.directions.checkpoint import load_direction
from pit_core.directions.piles import Encoders, find_between, pile_of
from pit_core.errors import PitError
from pit_core.files import save_tensors, sha256_of
from pit_core.miniature import assets, models, trained
from pit_core.miniature.assets import DIRECTIONS, IP_LORAS
from pit_core.miniature.attributes import ATTRIBUTES
from pit_core.miniature.directions import export_directions
from pit_core.miniature.export import add_files, file_entry

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def exported(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A folder of weights with the directions of an untrained stack, their piles, and what was told."""
    folder, told = tmp_path_factory.mktemp("made"), []
    add_files(_two_loras, folder / "weights")
    export_directions(
        stack,
        folder / "weights",
        piles=folder / "piles",
        count=3,
        progress=lambda what, done, total: told.append(f"{what} {done}/{total}"),
    )
    return folder / "weights", folder / "piles", told


def _two_loras(folder: Path) -> dict[str, dict]:
    tensors = lora_file(unet_shapes(tiny_stack.unet()), rank=2, layout="kohya")
    for name in IP_LORAS.values():
        save_tensors(folder / name, tensors, {})
    return {name: {**file_entry(folder / name), "stages": [], "figures": {}} for name in IP_LORAS.values()}


def test_names_are_those_of_what_makes_them() -> None:
    assert [attribute.title.replace(" ", "_") for attribute in ATTRIBUTES.values()] == list(DIRECTIONS)
    assert list(trained.IP_LORA_STAGES.values()) == list(IP_LORAS)
    for stage, name in zip(trained.IP_LORA_STAGES, IP_LORAS.values(), strict=True):
        assert name == f"{stage.replace('-', '_')}.safetensors"


# how they are made


def test_directions_are_those_between_their_piles_and_are_in_the_manifest(
    stack: Stack, exported: tuple[Path, Path, list[str]]
) -> None:
    weights, piles, told = exported
    files = models.read_manifest(weights)["files"]
    assert set(files) == {*DIRECTIONS.values(), *IP_LORAS.values()}
    models.check_weights(weights)
    for name, attribute in zip(DIRECTIONS.values(), ATTRIBUTES.values(), strict=True):
        entry, direction = files[name], load_direction(weights / name)
        assert entry["sha256"] == sha256_of(weights / name) and entry["bytes"] < 100_000
        assert entry["piles"] == {"pictures": 3, "seed": 51} and entry["stages"] == []
        assert 0 <= entry["figures"]["accuracy"] <= 1
        assert direction.names == attribute.names and direction.space == "tokens"
        folders = [piles / f"{attribute.field}_{end}" for end in attribute.names]
        pair = [pile_of([each], end) for each, end in zip(folders, attribute.names, strict=True)]
        again = find_between(*pair, Encoders(stack.encoder, stack.adapter))
        assert tiny_stack.same(direction.vector, again.vector) < 1e-6
        assert direction.adapter == stack.adapter.content_hash
    assert told[:3] == [f"drawing thin critters {done}/3" for done in (1, 2, 3)]


def test_nothing_changes_when_they_cannot_be_made(
    stack: Stack, exported: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    weights, piles, _ = exported
    before = (weights / "manifest.json").read_text("utf-8")
    with pytest.raises(PitError, match="exists already; name a new folder for the piles"):
        export_directions(stack, weights, piles=piles, count=3)
    with pytest.raises(PitError, match="pictures a side as a whole number from 3"):
        export_directions(stack, weights, count=2)
    with pytest.raises(PitError, match="MB may ship"):
        export_directions(stack, tmp_path, count=3, limit=1000)
    assert (weights / "manifest.json").read_text("utf-8") == before and not list(tmp_path.iterdir())


# how commands name them


@pytest.fixture
def shipped(exported: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(assets, "WEIGHTS", exported[0])
    return exported[0]


def test_names_stand_for_files_and_numbers_stay(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ["miniature/scene", "miniature/sheet:0.5", "own.safetensors:2", "C:\\own.safetensors"]
    scene, sheet = (str(shipped / name) for name in IP_LORAS.values())
    assert with_shipped(named, IP_LORAS) == [scene, f"{sheet}:0.5", *named[2:]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "miniature").mkdir()
    (tmp_path / "miniature/scene").touch()  # the user's own
    assert with_shipped(["miniature/scene:1"], IP_LORAS) == ["miniature/scene:1"]


def test_a_name_that_there_is_not_or_a_file_that_is_gone_is_told(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PitError, match="no 'miniature/wide'; there are miniature/thin_to_wide, miniature/fl"):
        with_shipped(["miniature/wide:1"], DIRECTIONS)
    monkeypatch.setattr(assets, "WEIGHTS", tmp_path)
    entry = {"sha256": "0" * 64, "bytes": 1, "stages": [], "figures": {}}
    manifest = {"files": {IP_LORAS["scene"]: entry, IP_LORAS["sheet"]: entry}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    (tmp_path / IP_LORAS["sheet"]).touch()
    for name, said in [("scene", "lacks its file"), ("sheet", "is damaged")]:
        with pytest.raises(PitError, match=said):
            with_shipped([f"miniature/{name}"], IP_LORAS)


def test_a_run_takes_them_by_name(run: Run, shipped: Path, tmp_path: Path) -> None:
    files = tiny_stack.save(tmp_path / "models")
    changes = ["--direction", "miniature/thin_to_wide:0.5", "--ip-lora", "miniature/scene:0.25"]
    part = Path(assets.__file__).parent / "parts/wings/purple_bat.png"
    code, out, err = run(
        "sample", "--parts", part, *changes, *_options(files), "--count", 1, "--out", tmp_path / "out"
    )
    assert code == 0, err
    record = json.loads((tmp_path / "out/001-record.json").read_text("utf-8"))
    (direction,), (lora,) = record["settings"]["directions"], record["model"]["loras"]
    assert direction["path"].endswith(DIRECTIONS["thin_to_wide"]) and direction["step"] == 0.5
    assert lora["path"].endswith(IP_LORAS["scene"]) and lora["strength"] == 0.25
    code, out, err = run("direction", "inspect", "miniature/thin_to_wide", "miniature/flat_to_sketch")
    assert code == 0 and "thin to wide" in out and "flat to sketch" in out
    code, out, err = run("lora", "inspect", "miniature/sheet")
    assert code == 0 and "rank 2" in out


def _options(files: StackFiles) -> Sequence[object]:
    named = [("--" + name.replace("_", "-"), path) for name, path in files.named().items()]
    return [*(word for pair in named for word in pair), "--steps", 2, "--prior-steps", 2]
