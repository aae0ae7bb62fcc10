"""The commands as a stranger first runs them: on the weights that ship, with nothing replaced."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pit_core.cli import main
from pit_core.directions.checkpoint import load_direction
from pit_core.ip_adapter.tokens import load_ip_tokens
from pit_core.lora.formats import load_lora
from pit_core.miniature.assets import DIRECTIONS, IP_LORAS
from pit_core.miniature.models import STACK_FILES, WEIGHTS, load_stack, read_manifest

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


@pytest.mark.skipif(not set(DIRECTIONS.values()) <= set(SHIPPED), reason="directions are not shipped yet")
def test_directions_are_those_of_the_shipped_encoders() -> None:
    stack = load_stack()
    for name in DIRECTIONS.values():
        direction = load_direction(WEIGHTS / name)
        assert direction.adapter == stack.adapter.content_hash, f"{name}: run pit miniature directions"
        assert direction.encoder == stack.encoder.content_hash, f"{name}: run pit miniature directions"


@pytest.mark.skipif(not set(IP_LORAS.values()) <= set(SHIPPED), reason="IP-LoRAs are not shipped yet")
def test_ip_loras_are_of_the_shipped_unet() -> None:
    renderer = load_stack().renderer
    for name in IP_LORAS.values():
        assert not renderer.placed(load_lora(WEIGHTS / name)).left


def test_the_weights_are_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _run(capsys, "verify", "--steps", 4, "--out", tmp_path)
    assert "FAIL" not in report and "ok    picture: " in report
    for name in STACK_FILES:
        assert f"ok    {name}: sha256 {SHIPPED[name]['sha256']}" in report
    assert _is_drawn(tmp_path / "verify.png")
