"""What every test shares: the repository's root, and one thread for tensors that are too small for two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pit_core.concepts import Stack

ROOT = Path(__file__).resolve().parent.parent


class _RootIsAFolder:
    """The root's `__init__.py` is for ComfyUI; pytest would import it too, under a name that cannot work."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    config.pluginmanager.register(_RootIsAFolder())


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a `pit` command in this process: (exit code, stdout, stderr)."""
    from pit_core.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


# what the evaluation's tests measure


@pytest.fixture(scope="module")
def stack() -> Stack:
    """An untrained stack; its pictures are as large as the miniature's readers want them."""
    import tiny_stack

    from pit_core.miniature.models import CANVAS

    made = tiny_stack.stack()
    made.defaults = replace(made.defaults, size=(CANVAS, CANVAS), steps=1)
    return made


@pytest.fixture(scope="module")
def judge() -> torch.nn.Module:
    """An untrained reader."""
    from pit_core.miniature.models import build_reader

    torch.manual_seed(0)
    return build_reader("judge").eval()
