"""The commands as a stranger first runs them: on the weights that ship, with nothing replaced."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pit_core.cli import main
from pit_core.ip_adapter.tokens import load_ip_tokens
from pit_core.miniature.models import STACK_FILES, WEIGHTS, read_manifest

SHIPPED = read_manifest(WEIGHTS)["files"]

pytestmark = pytest.mark.skipif(
    "ip_prior.safetensors" not in SHIPPED, reason="the miniature's IP-Prior has not been shipped yet"
)


def _run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """A command that has to succeed; what it says."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert (ended.value.code or 0, err) == (0, "")
    return out


def _is_drawn(path: Path) -> bool:
    """Whether there is more than one colour in the picture of 128 px."""
    with Image.open(path) as image:
        return image.size == (128, 128) and all(low < high for low, high in image.convert("RGB").getextrema())


def test_parts_become_a_concept(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [
        sorted((root / "pit_core/miniature/parts" / kind).glob("*.png"))[0] for kind in ("wings", "tail")
    ]
    few = ("--count", 1, "--prior-steps", 4, "--steps", 4)
    said = _run(capsys, "sample", "--parts", *parts, *few, "--out", tmp_path)
    assert "001-contact-sheet.png" in said
    assert _is_drawn(tmp_path / "001-concept-01.png")
    assert load_ip_tokens(tmp_path / "001-tokens.safetensors").tokens.isfinite().all()
    model = json.loads((tmp_path / "001-record.json").read_text("utf-8"))["model"]
    assert model["name"] == "miniature"
    assert model["hashes"] == {name: SHIPPED[name]["sha256"] for name in model["hashes"]}
    assert set(STACK_FILES) <= set(model["hashes"])


def test_the_weights_are_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _run(capsys, "verify", "--steps", 4, "--out", tmp_path)
    assert "FAIL" not in report and "ok    picture: " in report
    for name in STACK_FILES:
        assert f"ok    {name}: sha256 {SHIPPED[name]['sha256']}" in report
    assert _is_drawn(tmp_path / "verify.png")
