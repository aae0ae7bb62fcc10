"""`pit direction` and `pit sample --direction`, as a user meets them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_stack
import torch
from PIL import Image

from pit_core.concepts import StackFiles
from pit_core.directions.checkpoint import load_direction, save_direction
from pit_core.directions.direction import Direction
from pit_core.ip_adapter.tokens import IPTokens, load_ip_tokens, save_ip_tokens

Run = Callable[..., tuple[int, str, str]]
SHAPE = (tiny_stack.TOKENS, tiny_stack.CONTEXT)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> StackFiles:
    return tiny_stack.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def encoders(files: StackFiles) -> list[object]:
    return ["--image-encoder", files.image_encoder, "--ip-adapter", files.ip_adapter]


@pytest.fixture(scope="module")
def painter(files: StackFiles, encoders: list) -> list[object]:
    return [*encoders, "--sdxl", files.sdxl, "--steps", 2]


@pytest.fixture(scope="module")
def sampler(files: StackFiles, painter: list) -> list[object]:
    return [*painter, "--prior", files.prior, "--prior-steps", 2, "--count", 2, "--parts"]


@pytest.fixture(scope="module")
def piles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dark_ones/ and light/, nine pictures of noise each."""
    folder = tmp_path_factory.mktemp("piles")
    chance = np.random.default_rng(0)
    for name, low in (("dark_ones", 0), ("light", 150)):
        (folder / name).mkdir()
        for number in range(9):
            pixels = chance.integers(low, low + 100, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def saved(path: Path, seed: int = 0, scale: float = 1.0) -> Path:
    vector = scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    save_direction(path, Direction(vector, names=("a", "b")))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# find


@pytest.mark.parametrize(("space", "shape"), [("tokens", SHAPE), ("clip", (17, tiny_stack.VISION))])
def test_a_direction_is_found_between_two_folders(
    run: Run, piles: Path, encoders: list, tmp_path: Path, space: str, shape: tuple
) -> None:
    out = tmp_path / "light.safetensors"
    between = ["--from", piles / "dark_ones", "--to", piles / "light"]
    code, text, errors = run("direction", "find", *between, "--out", out, "--space", space, *encoders)
    assert (code, errors) == (0, "")
    assert text.startswith("dark ones to light: ") and "found from 9 and 9 pictures" in text
    found = load_direction(out)
    assert found.names == ("dark ones", "light") and found.space == space
    assert tuple(found.vector.shape) == shape and found.adapter and found.encoder
    assert found.evidence is not None and found.evidence.accuracy > 0.9


def test_token_files_need_no_models(run: Run, tmp_path: Path) -> None:
    for name, shift in (("thin", 0.0), ("wide", 5.0)):
        tokens = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0)) + shift
        save_ip_tokens(tmp_path / f"{name}.safetensors", IPTokens(tokens, 4, adapter="made"))
    files = ["--from", tmp_path / "thin.safetensors", "--to", tmp_path / "wide.safetensors"]
    out = tmp_path / "found.safetensors"
    code, text, _ = run("direction", "find", *files, "--out", out, "--method", "mean", "--to-name", "fat")
    assert code == 0 and "thin to fat" in text and "8 and 8 pictures" in text
    assert torch.allclose(load_direction(out).vector, torch.full((4, 6), 5.0), atol=1e-4)


def test_few_pictures_and_no_difference_are_notes(
    run: Run, piles: Path, encoders: list, tmp_path: Path
) -> None:
    same = [
        "--from",
        *sorted((piles / "light").iterdir())[:4],
        "--to",
        *sorted((piles / "light").iterdir())[4:],
    ]
    code, _, errors = run("direction", "find", *same, "--out", tmp_path / "x.safetensors", *encoders)
    assert code == 0 and "below 8 a side" in errors and "near chance" in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "PILE", "--to", "nowhere", "--out", "x.safetensors"], "no file 'nowhere'"),
        (["--from", "PILE", "--to", "EMPTY", "--out", "x.safetensors"], "holds no pictures"),
        (["--from", "PILE", "--to", "PILE", "--out", "x.pt"], "name the file x.safetensors"),
        (["--from", "PILE", "--to", "PILE", "--out", "x.safetensors"], "the same mean"),
        (["--from", "MIXED", "--to", "PILE", "--out", "x.safetensors", "--space", "clip"], "give pictures"),
        (["--from", "MIXED", "--to", "PILE", "--out", "x.safetensors"], "different adapters"),
    ],
)
def test_piles_that_do_not_work_are_one_sentence(
    run: Run,
    piles: Path,
    encoders: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").mkdir()
    save_ip_tokens("MIXED.safetensors", IPTokens(torch.ones(1, 4, 6), 4, adapter="another"))
    places = {"PILE": piles / "light", "MIXED": "MIXED.safetensors"}
    named = [places.get(argument, argument) for argument in arguments]
    code, _, errors = run("direction", "find", *named, *encoders)
    assert code == 2 and errors.startswith("pit: ") and words in errors and errors.count("\n") == 1
    assert names(tmp_path) == ["EMPTY", "MIXED.safetensors"]


# edit


def test_pictures_are_swept_along_a_direction(run: Run, piles: Path, painter: list, tmp_path: Path) -> None:
    two = sorted((piles / "light").iterdir())[:2]
    direction = saved(tmp_path / "wide.safetensors")
    arguments = ["--pictures", *two, "--direction", f"{direction}:2", "--sweep", "-1,0,1"]
    code, text, errors = run("direction", "edit", *arguments, "--out", tmp_path / "out", *painter)
    assert code == 0 and errors.startswith("note: a to b: It does not say") and "001-sweep.png" in text
    pictures = [f"001-edit-0{row}-0{column}.png" for row in (1, 2) for column in (1, 2, 3)]
    assert names(tmp_path / "out") == [*pictures, "001-sweep.png", "001-tokens.safetensors"]
    tokens = load_ip_tokens(tmp_path / "out" / "001-tokens.safetensors").tokens
    shift = 2 * load_direction(direction).vector
    assert torch.allclose(tokens[2] - tokens[1], shift, atol=1e-4)
    assert torch.allclose(tokens[4] - tokens[3], shift, atol=1e-4)
    with Image.open(tmp_path / "out" / pictures[2]) as image:
        assert image.text["pit step"] == "step +2"


def test_step_zero_is_the_picture_of_the_tokens_themselves(run: Run, painter: list, tmp_path: Path) -> None:
    tokens = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    save_ip_tokens(tmp_path / "t.safetensors", IPTokens(tokens, tiny_stack.TOKENS))
    one, two = (saved(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    for moves in ([f"{one}:0"], [f"{one}:1", f"{two}:-1", "--orthogonal", "--mask", "0-1"]):
        arguments = ["--tokens", tmp_path / "t.safetensors", "--direction", *moves]
        assert run("direction", "edit", *arguments, "--out", tmp_path / "out", *painter)[0] == 0
    pixels = [np.asarray(Image.open(tmp_path / f"out/00{i}-edit-01-01.png")) for i in (1, 2)]
    assert np.array_equal(*pixels)
    moved = load_ip_tokens(tmp_path / "out/002-tokens.safetensors").tokens
    assert torch.equal(moved[:, 2:], tokens[:, 2:].expand(2, -1, -1)) and not torch.equal(moved[0], moved[1])


def test_a_direction_in_clip_features_needs_the_picture(
    run: Run, piles: Path, painter: list, tmp_path: Path
) -> None:
    path = tmp_path / "clip.safetensors"
    save_direction(path, Direction(torch.ones(17, tiny_stack.VISION), "clip", ("a", "b")))
    picture = piles / "light" / "0.png"
    assert (
        run(
            "direction", "edit", "--pictures", picture, "--direction", path, "--out", tmp_path / "o", *painter
        )[0]
        == 0
    )
    save_ip_tokens(tmp_path / "t.safetensors", IPTokens(torch.ones(1, *SHAPE), tiny_stack.TOKENS))
    arguments = ["--tokens", tmp_path / "t.safetensors", "--direction", path, "--out", tmp_path / "none"]
    code, _, errors = run("direction", "edit", *arguments, *painter)
    assert code == 2 and "give the picture" in errors and not (tmp_path / "none").exists()


def test_edit_wants_one_thing_to_edit(run: Run, painter: list, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors")
    code, _, errors = run("direction", "edit", "--direction", path, *painter)
    assert code == 2 and "either --pictures or --tokens" in errors


# inspect


def test_inspect_tells_what_files_hold_and_how_alike_they_are(run: Run, tmp_path: Path) -> None:
    one, two = (saved(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2))
    torch.save(torch.ones(1, *SHAPE), tmp_path / "ip_direction.pt")
    picture = tmp_path / "look.png"
    code, text, errors = run(
        "direction", "inspect", one, two, tmp_path / "ip_direction.pt", "--picture", picture
    )
    assert code == 0 and "a to b: 4 IP tokens of width 32" in text and "ip_direction: 4 IP tokens" in text
    assert text.count("cosine") == 3 and "note: " in errors and picture.is_file()
    (tmp_path / "junk.pt").write_text("junk")
    code, _, errors = run("direction", "inspect", tmp_path / "junk.pt")
    assert code == 2 and errors.startswith("pit: 'junk.pt'")


# inside pit sample


def test_concepts_are_moved_between_prior_and_decoder_and_the_record_repeats_it(
    run: Run, piles: Path, sampler: list, tmp_path: Path
) -> None:
    part = piles / "light" / "0.png"
    direction, other = (saved(tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate("ab"))
    assert run("sample", *sampler, part, "--out", tmp_path / "out")[0] == 0
    moved = ["--direction", f"{direction}:0.8", f"{other}:-1"]
    code, _, errors = run("sample", *sampler, part, "--out", tmp_path / "out", *moved)
    assert code == 0 and errors.startswith("note: a to b: ")
    plain, edited = (load_ip_tokens(tmp_path / f"out/00{i}-tokens.safetensors").tokens for i in (1, 2))
    shift = 0.8 * load_direction(direction).vector - load_direction(other).vector
    assert torch.allclose(edited, plain + shift, atol=1e-5)

    record = json.loads((tmp_path / "out/002-record.json").read_text("utf-8"))
    assert [entry["step"] for entry in record["settings"]["directions"]] == [0.8, -1.0]
    assert run("sample", "--repeat", tmp_path / "out/002-record.json", "--out", tmp_path / "out")[0] == 0
    for name in ("concept-01.png", "concept-02.png", "tokens.safetensors"):
        a, b = ((tmp_path / f"out/00{i}-{name}") for i in (2, 3))
        if name.endswith("png"):
            assert np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))
        else:
            assert torch.equal(load_ip_tokens(a).tokens, load_ip_tokens(b).tokens)
    saved(direction, 7)
    code, _, errors = run("sample", "--repeat", tmp_path / "out/002-record.json", "--out", tmp_path / "out")
    assert code == 2 and "a.safetensors' has changed since" in errors


@pytest.mark.parametrize(
    ("direction", "words"),
    [
        (None, "There is no file"),
        (
            Direction(torch.ones(17, tiny_stack.VISION), "clip"),
            "in CLIP features, but the prior makes tokens",
        ),
        (Direction(torch.ones(16, 2048)), "moves 16 tokens of width 2048, but a picture has 4"),
    ],
)
def test_a_direction_that_does_not_fit_is_one_sentence(
    run: Run, piles: Path, sampler: list, tmp_path: Path, direction: Direction | None, words: str
) -> None:
    path = tmp_path / "odd.safetensors"
    if direction is not None:
        save_direction(path, direction)
    arguments = [*sampler, piles / "light" / "0.png", "--out", tmp_path / "out", "--direction", path]
    code, _, errors = run("sample", *arguments)
    assert code == 2 and words in errors and names(tmp_path / "out") == []
