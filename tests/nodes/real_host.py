"""Where a real ComfyUI is, and how to run something in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FLAG = "PIT_TESTS_ON_HOST"


def find() -> tuple[Path, Path]:
    """(folder, interpreter) of a ComfyUI; skips the test, and says why, where there is none."""
    if FLAG in os.environ:
        pytest.skip("already on the real host")
    places = [os.environ.get("COMFYUI_PATH"), Path.home() / "comfy" / "ComfyUI"]
    if ROOT.parent.name == "custom_nodes":
        places.insert(1, ROOT.parent.parent)
    found = [Path(p).resolve() for p in places if p and (Path(p) / "comfy" / "sd.py").is_file()]
    if not found:
        pytest.skip("no ComfyUI: name its folder in COMFYUI_PATH (and its interpreter in COMFYUI_PYTHON)")
    return found[0], _interpreter(found[0])


def run(*command: str, timeout: int) -> subprocess.CompletedProcess[str]:
    """Run the host's interpreter from the host's folder, on one thread and without a GPU."""
    comfyui, python = find()
    environment = {**os.environ, FLAG: str(comfyui), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(python), *command],
        cwd=comfyui,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _interpreter(comfyui: Path) -> Path:
    named = os.environ.get("COMFYUI_PYTHON")
    folders = [comfyui / "venv", comfyui / ".venv", comfyui.parent / "venv", comfyui.parent / ".venv"]
    inner = "Scripts/python.exe" if sys.platform == "win32" else "bin/python"
    for place in [Path(named)] if named else [folder / inner for folder in folders]:
        if place.is_file():
            return place
    pytest.skip(f"ComfyUI is in {comfyui}, but its interpreter is not known; name it in COMFYUI_PYTHON")
