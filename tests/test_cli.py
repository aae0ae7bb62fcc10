"""The `pit` command, as a user meets it: exit codes, sentences, files."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import tiny_stack
import torch
from lora_files import lora_file, lora_key, unet_shapes
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from pit_core.cli import main, several_values
from pit_core.concepts import StackFiles
from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
from pit_core.ip_adapter.checkpoint import load_ip_adapter
from pit_core.ip_adapter.resampler import Resampler
from pit_core.ip_adapter.tokens import load_ip_tokens
from pit_core.ip_prior.checkpoint import load_prior

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> StackFiles:
    return tiny_stack.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def models(files: StackFiles) -> list[object]:
    """The options that name all four models, and few steps."""
    named = [("--" + name.replace("_", "-"), path) for name, path in files.named().items()]
    return [*(word for pair in named for word in pair), "--steps", 2, "--prior-steps", 2]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of parts: two files, and two kinds in subfolders."""
    folder = tmp_path_factory.mktemp("parts")
    for name, colour in [
        ("wing.png", "red"),
        ("horns.png", "navy"),
        ("tails/curl.png", "green"),
        ("tails/fin.png", "lime"),
        ("eyes/big.png", "black"),
        ("eyes/small.png", "grey"),
    ]:
        part = Image.new("RGBA", (48, 30))
        ImageDraw.Draw(part).ellipse([4, 4, 40, 25], fill=colour)
        (folder / name).parent.mkdir(exist_ok=True)
        part.save(folder / name)
    return folder


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# parts in, concepts out


def test_parts_become_concepts_a_sheet_tokens_and_a_record(
    run: Run, models: list, parts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    wing, horns = parts / "wing.png", parts / "horns.png"
    code, text, errors = run(
        "sample", "--parts", wing, horns, "--count", 3, "--seed", 7, "--out", out, *models
    )
    assert (code, errors) == (0, "")
    assert "001-contact-sheet.png" in text
    concepts = [f"001-concept-0{i}.png" for i in (1, 2, 3)]
    assert _names(out) == [*concepts, "001-contact-sheet.png", "001-record.json", "001-tokens.safetensors"]
    assert _pixels(out / concepts[0]).shape == (32, 32, 3)
    with Image.open(out / concepts[1]) as image:
        assert image.text["pit seed"] == "8"
    tokens = load_ip_tokens(out / "001-tokens.safetensors")
    assert tokens.tokens.shape == (3, tiny_stack.TOKENS, tiny_stack.CONTEXT)
    assert tokens.null is not None

    record = json.loads((out / "001-record.json").read_text("utf-8"))
    for part, path in zip(record["jobs"][0]["parts"], (wing, horns), strict=True):
        assert (out / part["path"]).resolve() == path.resolve()
    assert [concept["seed"] for concept in record["jobs"][0]["concepts"]] == [7, 8, 9]
    assert len(record["jobs"][0]["parts"][0]["sha256"]) == 64
    assert set(record["model"]["files"]) == {"sdxl", "image_encoder", "ip_adapter", "prior"}
    assert record["settings"]["prior"]["steps"] == 2
    assert record["versions"]["torch"] == torch.__version__


def test_a_record_repeats_its_run_to_the_bit_beside_it(
    run: Run, models: list, parts: Path, tmp_path: Path
) -> None:
    arguments = ["--parts", parts / "wing.png", parts / "horns.png", "--count", 2, "--seed", 3, "--as-sketch"]
    assert (
        run("sample", *arguments, "--reference", parts / "eyes/big.png", "--out", tmp_path, *models)[0] == 0
    )
    before = {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}
    code, _, errors = run("sample", "--repeat", tmp_path / "001-record.json", "--out", tmp_path)
    assert (code, errors) == (0, "")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    for name in ("concept-01.png", "concept-02.png", "contact-sheet.png"):
        assert np.array_equal(_pixels(tmp_path / f"001-{name}"), _pixels(tmp_path / f"002-{name}"))
    a, b = (load_ip_tokens(tmp_path / f"00{i}-tokens.safetensors").tokens for i in (1, 2))
    assert torch.equal(a, b)


def test_a_record_is_not_repeated_with_other_files(
    run: Run, models: list, parts: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part.png"
    part.write_bytes((parts / "wing.png").read_bytes())
    out = tmp_path / "out"
    assert run("sample", "--parts", part, "--count", 1, "--out", out, *models)[0] == 0
    written = _names(out)
    part.write_bytes((parts / "horns.png").read_bytes())
    code, _, errors = run("sample", "--repeat", out / "001-record.json", "--out", out)
    assert code == 2
    assert "has changed since the run was recorded" in errors
    part.unlink()
    code, _, errors = run("sample", "--repeat", out / "001-record.json", "--out", out)
    assert code == 2
    assert "There is no file" in errors
    assert _names(out) == written


def test_a_record_is_not_repeated_with_other_settings_of_the_prior(
    run: Run, files: StackFiles, models: list, parts: Path, tmp_path: Path
) -> None:
    """They are in a file of their own beside the weights."""
    prior = tmp_path / "prior" / "prior.ckpt"
    shutil.copytree(files.prior.parent, prior.parent)
    given = [prior if word == files.prior else word for word in models]
    assert run("sample", "--parts", parts / "wing.png", "--count", 1, "--out", tmp_path, *given)[0] == 0
    settings = prior.with_name("cfg.yaml")
    settings.write_text(settings.read_text("utf-8").replace("use_ref: true", "use_ref: false"), "utf-8")
    _refused(run("sample", "--repeat", tmp_path / "001-record.json"), "recorded (prior)")


def test_a_repeated_run_takes_a_folder_and_a_device_and_nothing_else(
    run: Run, models: list, parts: Path, tmp_path: Path
) -> None:
    assert run("sample", "--parts", parts / "wing.png", "--count", 1, "--out", tmp_path, *models)[0] == 0
    repeat = ["sample", "--repeat", tmp_path / "001-record.json", "--out", tmp_path / "again"]
    for option, value in [("--steps", 9), ("--count", 8), ("--reference", parts / "wing.png")]:
        _refused(run(*repeat, option, value), f"leave out {option}")
    _refused(run(*repeat, "--as-sketch"), "leave out --as-sketch")
    _refused(run(*repeat, "--device", "toaster"), "The device 'toaster' is not available")
    assert run(*repeat, "--device", "cpu")[0] == 0


def test_a_record_of_other_versions_is_repeated_with_a_note(
    run: Run, models: list, parts: Path, tmp_path: Path
) -> None:
    assert run("sample", "--parts", parts / "wing.png", "--count", 1, "--out", tmp_path, *models)[0] == 0
    record = json.loads((tmp_path / "001-record.json").read_text("utf-8"))
    record["versions"]["torch"] = "1.0"
    (tmp_path / "old.json").write_text(json.dumps(record), "utf-8")
    code, _, errors = run("sample", "--repeat", tmp_path / "old.json", "--out", tmp_path)
    assert code == 0
    assert "note: The run was recorded with torch 1.0, but this is" in errors


def test_random_sets_take_at_most_one_part_of_a_kind(
    run: Run, models: list, parts: Path, tmp_path: Path
) -> None:
    arguments = ["sample", "--parts", parts, "--random", 6, "--seed", 5, *models]
    assert run(*arguments, "--out", tmp_path / "a")[0] == 0
    assert run(*arguments, "--out", tmp_path / "b")[0] == 0
    jobs = json.loads((tmp_path / "a/001-record.json").read_text("utf-8"))["jobs"]
    again = json.loads((tmp_path / "b/001-record.json").read_text("utf-8"))["jobs"]
    sets = [[Path(part["path"]) for part in job["parts"]] for job in jobs]
    assert [[path.name for path in each] for each in sets] == [
        [Path(part["path"]).name for part in job["parts"]] for job in again
    ]
    assert len(sets) == 6
    assert all(1 <= len(each) <= 3 for each in sets)
    for each in sets:
        kinds = [path.parent.name if path.parent.name in ("eyes", "tails") else path.name for path in each]
        assert len(set(kinds)) == len(kinds)
    assert sorted(seed["seed"] for job in jobs for seed in job["concepts"]) == list(range(5, 11))


def test_a_concept_can_be_started_from(run: Run, models: list, parts: Path, tmp_path: Path) -> None:
    base = ["sample", "--parts", parts / "wing.png", "--count", 1, "--out", tmp_path, *models]
    assert run(*base)[0] == 0
    assert run(*base, "--init", tmp_path / "001-concept-01.png", "--strength", "0.3")[0] == 0
    settings = json.loads((tmp_path / "002-record.json").read_text("utf-8"))["settings"]
    assert settings["prior"]["strength"] == 0.3
    a, b = (load_ip_tokens(tmp_path / f"00{i}-tokens.safetensors").tokens for i in (1, 2))
    assert tiny_stack.same(a, b) > 1e-3


def test_a_concept_can_be_varied_without_parts(run: Run, models: list, parts: Path, tmp_path: Path) -> None:
    given = ["sample", "--init", parts / "wing.png", "--count", 1, "--out", tmp_path, *models]
    code, _, errors = run(*given)
    assert (code, errors) == (0, "")
    record = json.loads((tmp_path / "001-record.json").read_text("utf-8"))
    assert (record["jobs"][0]["parts"], record["settings"]["prior"]["strength"]) == ([], 0.6)
    assert run("sample", "--repeat", tmp_path / "001-record.json", "--out", tmp_path)[0] == 0
    assert np.array_equal(*(_pixels(tmp_path / f"00{i}-contact-sheet.png") for i in (1, 2)))
    _refused(run(*given, "--random", 2), "Expected part pictures, got none")


def test_patterns_name_parts_and_references(run: Run, models: list, parts: Path, tmp_path: Path) -> None:
    """Windows' shells do not expand them."""
    given = ["--parts", parts / "*.png", "--reference", parts / "eyes" / "big*", "--count", 1]
    assert run("sample", *given, "--out", tmp_path, *models)[0] == 0
    job = json.loads((tmp_path / "001-record.json").read_text("utf-8"))["jobs"][0]
    assert [Path(part["path"]).name for part in job["parts"]] == ["horns.png", "wing.png"]
    assert [Path(part["path"]).name for part in job["reference"]] == ["big.png"]
    _refused(run("sample", "--parts", parts / "*.gif", *models), "Nothing matches the pattern")


def test_more_parts_than_the_prior_knows_is_a_note_not_an_error(
    run: Run, models: list, parts: Path, tmp_path: Path
) -> None:
    every = sorted(parts.rglob("*.png"))
    code, _, errors = run("sample", "--parts", *every, "--count", 1, "--out", tmp_path, *models)
    assert code == 0
    assert errors.startswith("note: 6 parts were given")


# the miniature, with the toy stack in its place: its own weights have tests of their own


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pit_core.miniature.models.load_stack", lambda **_options: tiny_stack.stack())


@pytest.mark.usefixtures("miniature")
def test_the_miniature_is_the_default_and_its_record_repeats(run: Run, parts: Path, tmp_path: Path) -> None:
    code, _, errors = run("sample", "--parts", parts / "wing.png", "--count", 2, "--out", tmp_path)
    assert (code, errors) == (0, "")
    record = json.loads((tmp_path / "001-record.json").read_text("utf-8"))
    assert (record["model"]["name"], record["model"]["hashes"]) == ("miniature", {"tiny": "0"})
    assert record["settings"]["render"]["steps"] == tiny_stack.QUICK.steps
    assert run("sample", "--repeat", tmp_path / "001-record.json", "--out", tmp_path)[0] == 0
    assert np.array_equal(*(_pixels(tmp_path / f"00{i}-concept-02.png") for i in (1, 2)))
    record["model"]["hashes"] = {"tiny": "1"}
    (tmp_path / "other.json").write_text(json.dumps(record))
    _refused(
        run("sample", "--repeat", tmp_path / "other.json"), "has changed since the run was recorded (tiny)"
    )


@pytest.mark.usefixtures("miniature")
def test_the_demo_says_first_where_its_pictures_are(run: Run, tmp_path: Path) -> None:
    code, text, errors = run("demo", "--out", tmp_path / "demo")
    assert code == 0, errors
    first = text.splitlines()[0]
    assert str(tmp_path / "demo") in first
    assert "001-contact-sheet.png" in first
    written = _names(tmp_path / "demo")
    assert "001-contact-sheet.png" in written
    assert sum(name.endswith("contact-sheet.png") for name in written) >= 2
    assert {Path(name).suffix for name in written} == {".png", ".safetensors", ".json"}
    code, text, _ = run("demo", "--out", tmp_path / "demo")  # a second time writes beside the first
    assert code == 0
    assert "001-" not in text.splitlines()[0]


# bad input: one sentence, exit code 2, nothing written


def _bad_picture(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("hello")
    elif kind == "wide":
        Image.new("L", (20_000, 10)).save(path)
    elif kind == "animated":
        Image.new("L", (9, 9)).save(path, save_all=True, append_images=[Image.new("L", (9, 9), 9)])
    elif kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "transparent":
        Image.new("RGBA", (9, 9)).save(path)
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "There is no file"),
        ("folder", "add --random 10"),
        ("empty", "is empty"),
        ("text", "is not a picture"),
        ("wide", "20000 x 10 px, too large"),
        ("animated", "has 2 frames, it is animated"),
        ("truncated", "is damaged or cut short"),
        ("transparent", "wholly transparent"),
    ],
)
def test_a_bad_part_is_one_sentence(
    run: Run, models: list, parts: Path, tmp_path: Path, kind: str, words: str
) -> None:
    bad = _bad_picture(kind, tmp_path)
    out = tmp_path / "out"
    _refused(run("sample", "--parts", parts / "wing.png", bad, "--out", out, *models), words)
    assert not out.exists()


def test_a_bad_part_is_found_before_the_models_are_read(
    run: Run, models: list, files: StackFiles, tmp_path: Path
) -> None:
    """The adapter is damaged as well, but the parts are looked at first; random sets are no exception."""
    given = [_bad_model("cut", files, tmp_path) if word == files.ip_adapter else word for word in models]
    folder = tmp_path / "parts"
    folder.mkdir()
    bad = _bad_picture("truncated", folder)
    _refused(run("sample", "--parts", folder, "--random", 2, *given), "'truncated.png' is damaged")
    bad.unlink()
    bad = _bad_picture("transparent", folder)
    _refused(run("sample", "--parts", bad, *given), "'transparent.png': This picture is wholly transparent")
    _refused(run("sample", "--init", bad, *given), "wholly transparent")


def test_a_cmyk_part_is_taken(run: Run, models: list, tmp_path: Path) -> None:
    Image.new("CMYK", (30, 30), (0, 200, 200, 0)).save(tmp_path / "print.jpg")
    code, _, errors = run(
        "sample", "--parts", tmp_path / "print.jpg", "--count", 1, "--out", tmp_path / "o", *models
    )
    assert (code, errors) == (0, "")


def _refused(result: tuple[int, str, str], words: str) -> None:
    code, out, errors = result
    assert code == 2, errors
    assert words in errors
    assert errors.startswith("pit: ")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors + out


@pytest.mark.parametrize(
    ("option", "kind", "words"),
    [
        ("--prior", "truncated", "damaged torch checkpoint"),
        ("--prior", "code", "pickle that holds Python objects"),
        ("--prior", "adapter", "IP-Adapter"),
        ("--prior", "empty", "is empty"),
        ("--prior", "missing", "There is no file"),
        ("--ip-adapter", "cut", "is cut short"),
        ("--ip-adapter", "prior", "not an IP-Adapter"),
        ("--ip-adapter", "code", "pickle that holds Python objects"),
        ("--image-encoder", "adapter", "not a CLIP image encoder"),
        ("--sdxl", "adapter", "no Stable Diffusion checkpoint"),
        ("--sdxl", "missing", "There is no file"),
        ("--sdxl", "encoder", "no diffusers folder"),
    ],
)
def test_a_bad_model_file_is_one_sentence(
    run: Run, files: StackFiles, parts: Path, tmp_path: Path, option: str, kind: str, words: str
) -> None:
    bad = _bad_model(kind, files, tmp_path)
    given = {"--" + name.replace("_", "-"): path for name, path in files.named().items()} | {option: bad}
    out = tmp_path / "out"
    named = [word for pair in given.items() for word in pair]
    _refused(run("sample", "--parts", parts / "wing.png", "--out", out, *named), words)
    assert not out.exists()


def test_an_adapter_for_sd15_is_refused_with_sdxl(
    run: Run, models: list, files: StackFiles, parts: Path, tmp_path: Path
) -> None:
    """A file as released: nested, pickled, with SD1.5's sixteen layers and text width."""
    projector = Resampler(
        dim=64, depth=1, dim_head=64, heads=1, num_queries=4, embedding_dim=tiny_stack.VISION, output_dim=768
    )
    adapter = IPAdapter(projector, IPLayers([16] * 16, 768))
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in adapter.state_dict().items():
        first, rest = key.split(".", 1)
        nested[first][rest] = tensor
    torch.save(nested, tmp_path / "ip-adapter-plus_sd15.bin")
    given = [tmp_path / "ip-adapter-plus_sd15.bin" if word == files.ip_adapter else word for word in models]
    out = tmp_path / "out"
    words = (
        "'ip-adapter-plus_sd15.bin' is made for SD1.5 (16 layers, text width 768), but the loaded model is"
    )
    _refused(run("sample", "--parts", parts / "wing.png", "--out", out, *given), words)
    assert not out.exists()


def _bad_model(kind: str, files: StackFiles, folder: Path) -> Path:
    path = folder / f"{kind}.ckpt"
    if kind == "truncated":
        path.write_bytes(files.prior.read_bytes()[:-3000])
    elif kind == "cut":
        path.write_bytes(files.ip_adapter.read_bytes()[:-10])
    elif kind == "code":
        torch.save({"a": subprocess.Popen}, path)
    elif kind == "empty":
        path.touch()
    same = {"adapter": files.ip_adapter, "prior": files.prior, "encoder": files.image_encoder}
    return same.get(kind, path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Expected part pictures, got none"),
        (["--count", "0"], "count from 1"),
        (["--seed", "-1"], "Expected a seed"),
        (["--seed", str(2**64)], "Expected a seed"),
        (["--steps", "0"], "Expected steps"),
        (["--prior-steps", "0"], "at least 1 step"),
        (["--guidance", "nan"], "finite guidance"),
        (["--prior-guidance", "inf"], "finite guidance"),
        (["--weight", "nan"], "finite weight"),
        (["--strength", "0.5"], "needs an initial concept"),
        (["--strength", "nan"], "Expected a strength"),
        (["--reference", "PART", "PART"], "1 picture or 4"),
        (["--random", "0"], "1 to 1000 random sets"),
        (["--device", "toaster"], "is not available"),
        (["--device", "meta"], "is not available"),
        (["--size", "33"], "multiples of 4"),
        (["--repeat", "PART"], "leave out --parts"),
        (["--size", "80000000"], "The memory is full"),
        (["--model", "huge"], "no model 'huge'"),
    ],
)
def test_values_that_make_no_sense_are_one_sentence(
    run: Run, models: list, parts: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    part = str(parts / "wing.png")
    given = [part if word == "PART" else word for word in arguments]
    named = [] if "--model" in arguments else models
    first = ["--parts", part] if arguments else []
    _refused(run("sample", *first, "--count", 1, "--out", tmp_path / "out", *named, *given), words)
    assert not (tmp_path / "out").exists()


def test_some_of_the_four_files_is_not_enough(run: Run, files: StackFiles, parts: Path) -> None:
    result = run("sample", "--parts", parts / "wing.png", "--prior", files.prior)
    _refused(result, "--sdxl, --image-encoder, --ip-adapter is missing")


def test_an_output_that_is_a_file_is_refused_before_the_work(
    run: Run, models: list, parts: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")
    _refused(run("sample", "--parts", parts / "wing.png", "--out", tmp_path / "out", *models), "is a file")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ("{}", "not the record of a run"),
        ('{"format": "piece-it-together run", "version": 99}', "record version 99"),
        ('{"format": "piece-it-together run", "version": 1}', "is damaged"),
    ],
)
def test_a_record_that_is_none_is_one_sentence(run: Run, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "r.json").write_text(content)
    _refused(run("sample", "--repeat", tmp_path / "r.json"), words)


def test_an_interrupted_run_leaves_nothing_and_exits_with_130(
    run: Run, models: list, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pit_core.sample.write_record", stop)  # as late as it gets: all else is written
    code, _, errors = run("sample", "--parts", parts / "wing.png", "--out", tmp_path / "out", *models)
    assert (code, errors) == (130, "pit: interrupted.\n")
    assert not (tmp_path / "out").exists()


def test_the_script_prints_one_line_and_no_traceback(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pit_core.cli", "sample", "--parts", str(tmp_path / "wing.png")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert done.stderr == f"pit: There is no file '{tmp_path / 'wing.png'}'.\n"


def test_names_that_the_console_cannot_show_are_escaped(
    files: StackFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Windows' output goes into a file: its own code page, and an error for what that lacks."""
    console = TextIOWrapper(BytesIO(), encoding="cp1252", errors="strict")
    monkeypatch.setattr(sys, "stdout", console)
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(files.prior), str(tmp_path / "\N{DRAGON}é.safetensors")])
    console.flush()
    assert int(caught.value.code or 0) == 0
    assert (tmp_path / "\N{DRAGON}é.safetensors").is_file()
    assert "\\U0001f409é.safetensors" in console.buffer.getvalue().decode("cp1252")


def test_help_imports_nothing_heavy(root: Path) -> None:
    script = """
import sys
from pit_core.cli import main
try:
    main(["--help"])
except SystemExit:
    print(sorted({"torch", "diffusers", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines()[-1] == "[]"


# LoRAs


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An IP-LoRA of the tiny stack, with the adapter's own layers, strong enough to be seen."""
    path = tmp_path_factory.mktemp("loras") / "scene.safetensors"
    shapes = unet_shapes(tiny_stack.unet(), ip=True)
    save_file({key: tensor * 3 for key, tensor in lora_file(shapes).items()}, path)
    return path


def test_pictures_are_drawn_under_an_ip_lora_and_repeated(
    run: Run, models: list, parts: Path, lora: Path, tmp_path: Path
) -> None:
    arguments = [
        "--parts",
        parts / "wing.png",
        "--count",
        1,
        "--prompt",
        "a beach",
        *models,
        "--out",
        tmp_path,
    ]
    assert run("sample", *arguments, "--ip-lora", lora)[::2] == (0, "")
    assert run("sample", *arguments, "--ip-lora", f"{lora}:0.5")[0] == 0
    assert run("sample", *arguments)[0] == 0
    assert run("sample", "--repeat", tmp_path / "002-record.json", "--out", tmp_path)[::2] == (0, "")
    one, half, none, again = (_pixels(tmp_path / f"00{i}-concept-01.png") for i in (1, 2, 3, 4))
    assert np.array_equal(half, again)
    assert not np.array_equal(one, none) and not np.array_equal(half, one)
    records = [json.loads((tmp_path / f"00{i}-record.json").read_text("utf-8")) for i in (2, 3)]
    (entry,) = records[0]["model"]["loras"]
    assert (tmp_path / entry["path"]).resolve() == lora.resolve() and entry["strength"] == 0.5
    render = records[0]["settings"]["render"]
    assert (render["negative"], render["same_tokens"], render["prompt"]) == (None, True, "a beach")
    assert records[1]["model"]["loras"] == [] and records[1]["settings"]["render"]["negative"]


def test_a_changed_lora_is_not_repeated(
    run: Run, models: list, parts: Path, lora: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.safetensors"
    shutil.copy(lora, mine)
    arguments = ["--parts", parts / "wing.png", "--count", 1, *models, "--out", tmp_path / "out"]
    assert run("sample", *arguments, "--ip-lora", mine)[0] == 0
    save_file({key: tensor / 2 for key, tensor in load_file(mine).items()}, mine)
    code, _, errors = run("sample", "--repeat", tmp_path / "out/001-record.json", "--out", tmp_path / "out")
    assert code == 2 and "mine.safetensors' has changed" in errors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone.safetensors", "gone.safetensors"),
        ("gone.safetensors:0.5", "gone.safetensors"),
        ("{lora}:nan", "strengths to be finite numbers"),
        ("{lora}:much", "scene.safetensors:much"),
        ("{other}", "it was made for another model"),
    ],
)
def test_a_bad_lora_is_one_sentence(
    run: Run, models: list, parts: Path, lora: Path, tmp_path: Path, name: str, words: str
) -> None:
    other = tmp_path / "other.safetensors"
    save_file(lora_file({"down_blocks.9.attentions.0.to_q": (4, 4)}), other)
    given = name.format(lora=lora, other=other)
    out = tmp_path / "out"
    code, _, errors = run("sample", "--parts", parts / "wing.png", "--ip-lora", given, "--out", out, *models)
    assert code == 2 and words in errors and errors.count("\n") == 1
    assert _names(out) == []


def test_what_of_a_lora_is_not_applied_is_a_note(
    run: Run, models: list, parts: Path, lora: Path, tmp_path: Path
) -> None:
    more = lora_file({"down_blocks.9.attentions.0.to_q": (4, 4)})
    save_file({**load_file(lora), **more}, tmp_path / "more.safetensors")
    code, _, errors = run(
        "sample", "--parts", parts / "wing.png", "--count", 1, "--ip-lora", tmp_path / "more.safetensors",
        "--out", tmp_path / "out", *models,
    )  # fmt: skip
    assert code == 0
    assert errors.startswith("note: 1 of ") and "are not applied (down_blocks.9.attentions.0.to_q)" in errors


def test_a_lora_is_inspected(run: Run, lora: Path, tmp_path: Path) -> None:
    count = len(unet_shapes(tiny_stack.unet(), ip=True))
    code, text, _ = run("lora", "inspect", lora, "--picture", tmp_path / "norms.png")
    lines = text.splitlines()
    assert code == 0
    assert lines[0].startswith(f"'scene.safetensors': IP-LoRA, rank 4 ({count} layers), scale 1, ")
    assert lines[1].startswith(f"{count} layers in ")
    assert lines[2].split() == ["block", "layers", "norm", "self-attention", "text", "image"]
    names, layers, norms = zip(*(line.split()[:3] for line in lines[3:-1]), strict=True)
    assert names[0].startswith("down_blocks.1") and names[-1].startswith("up_blocks.1")
    assert sum(map(int, layers)) == count and all(float(norm) > 0 for norm in norms)
    assert _pixels(tmp_path / "norms.png").shape[1] == 720
    code, _, errors = run("lora", "inspect", lora, "--picture", tmp_path / "norms.jpg")
    assert code == 2 and "norms.png" in errors and _names(tmp_path) == ["norms.png"]


@pytest.mark.parametrize(("layout", "key"), [("kohya", "kohya"), ("diffusers", "peft")])
def test_a_lora_is_converted(run: Run, lora: Path, tmp_path: Path, layout: str, key: str) -> None:
    target = tmp_path / "new.safetensors"
    code, text, errors = run("lora", "convert", lora, target, "--layout", layout, "--dtype", "float16")
    assert code == 0
    assert text.startswith("scene.safetensors -> ") and "float16" in text
    assert "layers belong to the IP-Adapter" in errors
    before, after = load_file(lora), load_file(target)
    for module in unet_shapes(tiny_stack.unet(), ip=True):
        for part in ("down", "up"):
            was = before[lora_key(module, part, "released")]
            assert torch.equal(after[lora_key(module, part, key)], was.half())


def test_what_is_no_lora_is_not_converted(run: Run, lora: Path, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    for source, target, words in [
        (tmp_path / "a.safetensors", tmp_path / "new.safetensors", "is not a LoRA"),
        (lora, lora, "is the file being converted"),
        (lora, tmp_path / "new.bin", "name the file new.safetensors"),
        (tmp_path / "gone.safetensors", tmp_path / "new.safetensors", "gone.safetensors"),
    ]:
        code, _, errors = run("lora", "convert", source, target)
        assert code == 2 and words in errors
    assert _names(tmp_path) == ["a.safetensors"]


# arguments


def test_several_values_may_follow_one_option() -> None:
    given = ["sample", "--parts", "a", "b", "--count", "2", "--reference=x", "y", "--parts", "c"]
    assert several_values(given) == [
        *("sample", "--parts", "a", "--parts", "b", "--count", "2"),
        *("--reference=x", "--reference", "y", "--parts", "c"),
    ]
    assert several_values(["download", "sdxl", "--into", "a"]) == ["download", "sdxl", "--into", "a"]
    assert several_values([]) == []


# the other commands


def test_a_prior_and_an_adapter_are_converted(run: Run, files: StackFiles, tmp_path: Path) -> None:
    code, text, _ = run("convert", files.prior, tmp_path / "prior.safetensors")
    assert code == 0
    assert "prior.ckpt ->" in text
    prior, info = load_prior(tmp_path / "prior.safetensors")
    assert info.use_ref
    assert all(
        torch.equal(a, b) for a, b in zip(prior.parameters(), tiny_stack.prior().parameters(), strict=True)
    )

    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    adapter = load_ip_adapter(files.ip_adapter)
    for key, tensor in adapter.state_dict().items():
        first, rest = key.split(".", 1)
        nested[first][rest] = tensor
    torch.save(nested, tmp_path / "adapter.bin")
    assert run("convert", tmp_path / "adapter.bin", tmp_path / "a.safetensors", "--dtype", "float16")[0] == 0
    half = load_ip_adapter(tmp_path / "a.safetensors")
    for key, tensor in adapter.state_dict().items():
        assert torch.equal(half.state_dict()[key], tensor.half())


def test_what_cannot_be_converted_is_one_sentence(run: Run, files: StackFiles, tmp_path: Path) -> None:
    save_file({"lora.up": torch.zeros(2)}, tmp_path / "lora.safetensors")
    target = tmp_path / "new.safetensors"
    for source, to, words in [
        (tmp_path / "lora.safetensors", target, "LoRA"),
        (files.prior, tmp_path / "new.ckpt", "ends in .safetensors"),
        (files.ip_adapter, files.ip_adapter, "is the file being converted"),
        (tmp_path / "none.bin", target, "There is no file"),
    ]:
        _refused(run("convert", source, to), words)
    assert not target.exists()


def test_downloads_are_listed_and_unknown_names_refused(run: Run, tmp_path: Path) -> None:
    code, text, _ = run("download")
    assert code == 0
    assert "characters-prior" in text
    _refused(run("download", "everything", "--into", tmp_path / "m"), "no release named 'everything'")
    assert not (tmp_path / "m").exists()


def test_verify_reports_and_tells_by_its_exit_code(run: Run, files: StackFiles, tmp_path: Path) -> None:
    code, text, _ = run("verify", "--prior", files.prior, "--ip-adapter", files.ip_adapter)
    assert code == 0
    assert "made for each other" in text
    code, text, _ = run("verify", "--prior", files.ip_adapter)
    assert code == 2
    assert "FAIL  --prior" in text


@pytest.mark.usefixtures("miniature")
def test_verify_takes_the_steps_for_the_miniature_too(run: Run) -> None:
    pictures = [run("verify", *steps)[1].splitlines()[-2] for steps in ([], ["--steps", 1], ["--steps", 2])]
    assert all(picture.startswith("ok    picture") for picture in pictures)
    assert pictures[0] == pictures[2] != pictures[1]  # the toy stack's own are 2
    code, text, _ = run("verify", "--steps", 0)
    assert code == 2
    assert "FAIL  picture: Expected steps" in text


def test_the_version_is_told(run: Run) -> None:
    from pit_core import __version__

    assert run("--version")[:2] == (0, f"pit {__version__}\n")
