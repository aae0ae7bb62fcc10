"""The nodes on a bench: ComfyUI's stand-in, or the real one (see test_on_the_real_host.py)."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import benches  # noqa: E402
import real_host  # noqa: E402

HOST = os.environ.get("PIT_TESTS_ON_HOST")


def _runs_in_the_host(path: Path) -> bool:
    """What stands on the bench does, unless it starts a host of its own."""
    text = path.read_text("utf-8")
    return "Bench" in text and "pytest.mark.host" not in text


collect_ignore = [p.name for p in HERE.glob("test_*.py") if not _runs_in_the_host(p)] if HOST else []


def pytest_configure(config: pytest.Config) -> None:
    """The host's interpreter has pytest at most, none of its plugins."""
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[benches.Bench]:
    folder = tmp_path_factory.mktemp("host")
    made = benches.RealBench(Path(HOST), folder) if HOST else benches.DoubleBench(folder)
    yield made
    made.close()


@pytest.fixture(scope="module", params=real_host.parameters())
def comfyui(request: pytest.FixtureRequest) -> Path:
    """The folder of a real ComfyUI; each test runs in every one that there is."""
    return request.param


@pytest.fixture
def double(bench: benches.Bench) -> benches.DoubleBench:
    """For what can only be looked at on the stand-in."""
    if not isinstance(bench, benches.DoubleBench):
        pytest.skip("looks into the stand-in")
    return bench


@pytest.fixture
def real(bench: benches.Bench) -> benches.RealBench:
    """For what only ComfyUI itself can show."""
    if not isinstance(bench, benches.RealBench):
        pytest.skip("runs in ComfyUI itself")
    return bench


@pytest.fixture
def shipped(bench: benches.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the weights that ship."""
    monkeypatch.setattr(bench.part("nodes.miniature"), "WEIGHTS", tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def clean_folders(bench: benches.Bench) -> Iterator[None]:
    yield
    for name in benches.FOLDERS:
        shutil.rmtree(bench.folder / name, ignore_errors=True)
        (bench.folder / name).mkdir(parents=True)
