"""`pit data` and `pit train ip-prior` as a user meets them: from a folder of pictures to a trained prior."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_parts
import tiny_stack
import yaml
from PIL import Image

from pit_core.concepts import StackFiles
from pit_core.parts.manifest import read_manifest
from pit_core.parts.shards import read_index
from pit_core.parts.sheet import choose_rows

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> StackFiles:
    return tiny_stack.save(tmp_path_factory.mktemp("models"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten targets with 0 to 2 parts each, told apart by their names alone."""
    tiny_parts.write_set(tmp_path / "pictures").unlink()
    return tmp_path / "pictures"


def test_from_a_folder_of_pictures_to_a_prior_that_samples(
    run: Run, files: StackFiles, pictures: Path, tmp_path: Path
) -> None:
    code, text, _ = run("data", "import", pictures)
    assert code == 0 and "10 wholes with 9 parts, 0 files left out" in text
    manifest = pictures / "parts.jsonl"
    assert read_manifest(manifest)[2].parts == ("2_0.png", "2_1.png")

    code, text, _ = run("data", "show", manifest, "--out", tmp_path / "sheet.png", "--count", 3)
    assert code == 0 and "3 of 10 wholes" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height > 3 * 192

    (tmp_path / "augment.yaml").write_text("use_ref: true\nsketch_prob: 0.25\n")
    embed = ("data", "embed", manifest, "--out", tmp_path / "tokens", "--config", tmp_path / "augment.yaml")
    models = ("--image-encoder", files.image_encoder, "--ip-adapter", files.ip_adapter)
    code, text, _ = run(*embed, *models, "--views", 2, "--shard-size", 4)
    assert code == 0 and "10 wholes in 3 shards, 3 of them encoded now" in text
    assert read_index(tmp_path / "tokens").augment.sketch_prob == 0.25
    assert "0 of them encoded now" in run(*embed, *models, "--views", 2, "--shard-size", 4)[1]

    settings = {
        "tokens": "tokens",
        "out": "run",
        "prior": {"hidden_dim": 32, "num_layers": 1, "num_attention_heads": 2},
        "train": {"steps": 2, "batch_size": 2},
    }
    (tmp_path / "prior.yaml").write_text(yaml.safe_dump(settings))
    assert run("train", "ip-prior", "--config", tmp_path / "prior.yaml")[0] == 0
    named = files.named() | {"prior": tmp_path / "run" / "ip_prior.safetensors"}
    options = [word for name, path in named.items() for word in ("--" + name.replace("_", "-"), path)]
    part = pictures / "1_0.png"
    code, _, errors = run(
        *("sample", "--parts", part, "--reference", pictures / "3.png", "--count", 1),
        *(*options, "--steps", 2, "--prior-steps", 2, "--out", tmp_path / "concepts"),
    )
    assert (code, errors) == (0, "")
    assert (tmp_path / "concepts" / "001-concept-01.png").is_file()


def test_only_what_is_shown_is_looked_at(run: Run, pictures: Path, tmp_path: Path) -> None:
    run("data", "import", pictures)
    chosen = choose_rows(10, 3)
    other = min(set(range(10)) - set(chosen))
    for number in (chosen[0], other):
        (pictures / f"{number}.png").write_bytes(b"")
    sheet = ("--out", tmp_path / "sheet.png", "--count", 3)
    code, text, errors = run("data", "show", pictures / "parts.jsonl", *sheet)
    assert code == 0 and "2 of 10 wholes" in text
    assert f"'{chosen[0]}.png' is empty" in errors and f"'{other}.png'" not in errors


def test_an_import_does_not_overwrite_a_manifest_and_names_what_it_leaves_out(
    run: Run, pictures: Path
) -> None:
    tiny_parts.draw_blob(pictures / "lost_7.png", (1, 2, 3))
    code, text, errors = run("data", "import", pictures, "--layout", "readme", "--name", "mine.jsonl")
    assert code == 0 and "1 files left out" in text
    assert "left out: 'lost_7.png' is named as a part" in errors
    before = (pictures / "mine.jsonl").read_bytes()
    code, _, errors = run("data", "import", pictures, "--name", "mine.jsonl")
    assert code == 2 and "already there" in errors
    assert (pictures / "mine.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("import", "{folder}/absent"), "There is no folder"),
        (("import", "{folder}", "--name", "../x.jsonl"), "not a usable name"),
        (("show", "{folder}/absent.jsonl"), "There is no file"),
        (
            ("embed", "{folder}/absent.jsonl", "--ip-adapter", "x"),
            "Give both --image-encoder and --ip-adapter",
        ),
        (("embed", "{folder}/absent.jsonl", "--config", "{folder}/bad.yaml"), "did you mean 'max_crops'"),
        (("embed", "{folder}/absent.jsonl", "--actors", "2"), "--actors and --actor-gpus are for --ray"),
        (("embed", "{folder}/absent.jsonl", "--ray"), "There is no file"),
    ],
)
def test_mistakes_end_in_a_sentence(run: Run, pictures: Path, arguments: tuple[str, ...], said: str) -> None:
    (pictures / "bad.yaml").write_text("max_crop: 3\n")
    code, _, errors = run("data", *(argument.format(folder=pictures) for argument in arguments))
    assert code == 2 and said in errors
    assert "Traceback" not in errors


def test_without_ray_the_extra_is_named(
    run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("data", "import", pictures)[0] == 0
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, errors = run("data", "embed", pictures / "parts.jsonl", "--out", tmp_path / "tokens", "--ray")
    assert code == 2 and "install the extra: pip install -e '.[scale]'" in errors
    assert not (tmp_path / "tokens" / "index.json").exists()
