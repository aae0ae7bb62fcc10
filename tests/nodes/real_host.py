"""Where real ComfyUIs are, and how to run something in one of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FLAG = "PIT_TESTS_ON_HOST"


def folders() -> list[Path]:
    """All that COMFYUI_PATH names, separated as in PATH; else the first in the usual places; else none."""
    if FLAG in os.environ:  # already in one
        return []
    usual = [Path.home() / "comfy" / "ComfyUI"]
    if ROOT.parent.name == "custom_nodes":
        usual.insert(0, ROOT.parent.parent)
    named = [Path(place) for place in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if place]
    found = [place.resolve() for place in named or usual if (place / "comfy" / "sd.py").is_file()]
    return found if named else found[:1]


def parameters() -> list[Any]:
    """For a fixture that gives its tests one ComfyUI after the other; without any they skip, and say why."""
    reason = "no ComfyUI: name its folder in COMFYUI_PATH (and its interpreter in COMFYUI_PYTHON)"
    none = pytest.param(None, id="no host", marks=pytest.mark.skip(reason=reason))
    return [pytest.param(place, id=place.name) for place in folders()] or [none]


def run(comfyui: Path, *command: str, timeout: int) -> subprocess.CompletedProcess[str]:
    """Run the host's interpreter from the host's folder, on one thread and without a GPU."""
    environment = {**os.environ, FLAG: str(comfyui), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(interpreter(comfyui)), *command],
        cwd=comfyui,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def interpreter(comfyui: Path) -> Path:
    """The one in COMFYUI_PYTHON, for all of them, or the host's own; skips the test where there is none."""
    named = os.environ.get("COMFYUI_PYTHON")
    places = [comfyui / "venv", comfyui / ".venv", comfyui.parent / "venv", comfyui.parent / ".venv"]
    inner = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    for place in [Path(named)] if named else [folder / inner for folder in places]:
        if place.is_file():
            return place
    pytest.skip(f"ComfyUI is in {comfyui}, but its interpreter is not known; name it in COMFYUI_PYTHON")
