"""`pit verify` on whole files, on broken ones, and on ones that do not belong together."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_stack
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pit_core.concepts import StackFiles
from pit_core.ip_adapter.checkpoint import save_ip_adapter
from pit_core.runs import fingerprint
from pit_core.verify import Report, verify, verify_stack


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> StackFiles:
    return tiny_stack.save(tmp_path_factory.mktemp("models"))


def test_files_in_order_are_reported_with_hashes_and_a_picture(files: StackFiles, tmp_path: Path) -> None:
    report = verify(files.named(), out=tmp_path, steps=2)
    text = str(report)
    assert report.ok
    assert text.count("sha256") == 4
    assert text.count("made for each other") == 3
    for words in ("torch ", "11 layers", "IP-Adapter Plus, 4 tokens", "use_ref True", "picture: seed"):
        assert words in text
    assert str(files.prior.parent) not in text  # no folders of the user's machine
    assert report.picture is not None
    with Image.open(report.picture) as picture:
        assert picture.size == (32, 32)
    assert str(verify(files.named(), steps=2)).splitlines()[-2] == text.splitlines()[-2]  # the picture's hash


def test_the_folder_with_sdxls_settings_is_in_the_report(files: StackFiles, tmp_path: Path) -> None:
    shutil.copytree(files.sdxl, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    lines = str(verify({"sdxl_config": tmp_path / "config"})).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("ok    --sdxl-config config: "))
    assert lines[at + 1] == f"      sha256 {fingerprint(tmp_path / 'config')}"
    (tmp_path / "config" / "model_index.json").unlink()
    report = verify({"sdxl_config": tmp_path / "config"})
    assert not report.ok
    assert "FAIL  --sdxl-config config: 'config' is no diffusers folder" in str(report)


def test_an_unexpected_error_is_a_line_and_the_others_go_on(tmp_path: Path) -> None:
    report = Report(paths=(tmp_path / "sdxl",))

    def fail() -> None:
        raise KeyError(f"{tmp_path}/sdxl\nof {Path.home()}")

    assert report.check("division", lambda: 1 / 0) is None
    assert report.check("key", fail) is None
    assert report.check("third", lambda: (3, "fine")) == 3
    assert not report.ok
    assert report.lines[0] == "FAIL  division: ZeroDivisionError: division by zero"
    assert report.lines[1].startswith("FAIL  key: KeyError: 'sdxl")
    assert str(tmp_path) not in str(report) and str(Path.home()) not in str(report)
    assert report.lines[2] == "ok    third: fine"


def test_a_unet_config_that_nobody_expected_fails_as_a_line(files: StackFiles, tmp_path: Path) -> None:
    shutil.copytree(files.sdxl, tmp_path / "sdxl")
    config = json.loads((files.sdxl / "unet" / "config.json").read_text("utf-8"))
    config["reverse_transformer_layers_per_block"] = [1]
    (tmp_path / "sdxl" / "unet" / "config.json").write_text(json.dumps(config), "utf-8")
    report = verify({"sdxl": tmp_path / "sdxl", "prior": files.prior})
    assert [line[:12] for line in report.lines if line.startswith("FAIL")] == ["FAIL  --sdxl"]
    assert "ok    --prior" in str(report)


def test_a_picture_that_cannot_be_kept_fails_as_a_line(files: StackFiles, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file in the way")
    report = verify(files.named(), out=tmp_path / "out", steps=1)
    assert not report.ok
    assert report.picture is None
    assert "FAIL  picture: " in str(report)


def test_a_single_file_is_checked_alone(files: StackFiles) -> None:
    report = verify({"prior": files.prior})
    assert report.ok
    assert "No picture was made: that needs --sdxl, --image-encoder, --ip-adapter too" in str(report)


def test_settings_that_had_to_be_assumed_are_named(files: StackFiles, tmp_path: Path) -> None:
    shutil.copy(files.prior, tmp_path / "prior.ckpt")
    report = verify({"prior": tmp_path / "prior.ckpt"})
    assert report.ok
    assert "note  'prior.ckpt' does not say" in str(report)


def test_broken_files_fail_with_a_sentence_each(files: StackFiles, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(files.ip_adapter.read_bytes()[:-100])
    tensors = load_file(files.ip_adapter)
    tensors["image_proj.proj_in.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    (tmp_path / "empty.ckpt").touch()
    torch.save({"a": Image.new}, tmp_path / "code.ckpt")
    for option, path, words in [
        ("ip_adapter", cut, "is cut short"),
        ("ip_adapter", tmp_path / "nan.safetensors", "NaN or infinite"),
        ("ip_adapter", files.prior, "not an IP-Adapter"),
        ("prior", tmp_path / "empty.ckpt", "is empty"),
        ("prior", tmp_path / "code.ckpt", "pickle that holds Python objects"),
        ("prior", files.ip_adapter, "IP-Adapter"),
        ("prior", tmp_path / "missing.ckpt", "There is no file"),
        ("image_encoder", files.ip_adapter, "not a CLIP image encoder"),
        ("sdxl", files.ip_adapter, "no Stable Diffusion checkpoint"),
        ("sdxl", files.image_encoder, "no diffusers folder"),
    ]:
        report = verify({option: path})
        failed = [line for line in str(report).splitlines() if line.startswith("FAIL")]
        assert not report.ok
        assert len(failed) == 1
        assert words in failed[0]


def test_sdxl_with_numbers_that_are_not_finite_fails(files: StackFiles, tmp_path: Path) -> None:
    shutil.copytree(files.sdxl, tmp_path / "sdxl")
    weights = tmp_path / "sdxl" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"][0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    report = verify(files.named() | {"sdxl": tmp_path / "sdxl"}, steps=2)
    assert not report.ok
    assert "FAIL  all together: the unet of 'sdxl' holds NaN" in str(report)


def test_a_report_names_no_folders_of_the_users_machine(files: StackFiles, tmp_path: Path) -> None:
    shutil.copytree(files.sdxl, tmp_path / "sdxl")
    (tmp_path / "sdxl" / "unet" / "config.json").write_text("[]")
    for option, path in [("prior", tmp_path / "none" / "prior.ckpt"), ("sdxl", tmp_path / "sdxl")]:
        report = verify({option: path})
        assert not report.ok
        assert str(tmp_path) not in str(report)
    (tmp_path / "sdxl" / "unet" / "config.json").write_bytes(
        (files.sdxl / "unet" / "config.json").read_bytes()
    )
    (tmp_path / "sdxl" / "vae" / "config.json").unlink()
    report = verify(files.named() | {"sdxl": tmp_path / "sdxl"})
    assert not report.ok
    assert str(tmp_path) not in str(report)


def test_files_of_different_families_fail_in_pairs(files: StackFiles, tmp_path: Path) -> None:
    tiny_stack.save_prior(tmp_path / "prior.ckpt", tokens=6)
    save_ip_adapter(tmp_path / "wide.safetensors", tiny_stack.adapter(tiny_stack.unet(), width=40))
    report = verify(
        files.named() | {"prior": tmp_path / "prior.ckpt", "ip_adapter": tmp_path / "wide.safetensors"}
    )
    failed = [line for line in str(report).splitlines() if line.startswith("FAIL")]
    assert [line.split(":")[0] for line in failed] == [
        "FAIL  --ip-adapter and --image-encoder",
        "FAIL  --ip-adapter and --prior",
    ]
    assert "picture" not in str(report).replace("No picture", "")


def test_a_loaded_stack_is_verified_too(tmp_path: Path) -> None:
    report = verify_stack(tiny_stack.stack(), out=tmp_path)
    assert report.ok
    assert (tmp_path / "verify.png").is_file()
