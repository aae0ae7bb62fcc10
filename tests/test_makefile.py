"""Which torch build the Makefile installs; `make -n` says what it would run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CPU, CUDA = "https://example.org/cpu", "https://example.org/cu128"

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "requirements.txt", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    return tmp_path


def _choose(folder: Path, index: str) -> None:
    """An environment with torch from that index, of a folder that has another name now."""
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".torch-index").write_text(f"{index}\n")


def _torch_installed(folder: Path, *given: str) -> str:
    """What follows the name torch on pip's command line; the given index has to be noted."""
    # These tests themselves may run under make, which would hand its variables on.
    environment = {"PATH": os.environ["PATH"]}
    command = ["make", "-n", "demo", *given]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stdout.splitlines()
    [noted] = [line for line in lines if "> .venv/.torch-index" in line]
    [installed] = [line for line in lines if " install " in line and " torch" in line]
    index = given[0].removeprefix("TORCH_INDEX=") if given else ""
    assert not index or f'echo "{index}"' in noted
    return installed.rsplit(" torch", 1)[1].strip()


def test_the_first_environment_has_the_asked_for_build(copy: Path) -> None:
    assert _torch_installed(copy) == ""
    assert _torch_installed(copy, f"TORCH_INDEX={CPU}").split() == ["--index-url", CPU, "--force-reinstall"]


@pytest.mark.parametrize("given", [[], [f"TORCH_INDEX={CPU}"]])
def test_a_moved_environment_is_made_anew_with_the_same_build(copy: Path, given: list[str]) -> None:
    _choose(copy, CPU)
    assert _torch_installed(copy, *given).split() == ["--index-url", CPU]


def test_another_build_replaces_the_installed_one(copy: Path) -> None:
    _choose(copy, CPU)
    assert _torch_installed(copy, f"TORCH_INDEX={CUDA}").split() == ["--index-url", CUDA, "--force-reinstall"]
