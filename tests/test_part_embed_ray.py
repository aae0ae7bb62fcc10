"""`pit data embed --ray`: the plain command's shards, also when processes or the whole run are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import tiny_parts
import tiny_stack

from pit_core.errors import PitError
from pit_core.parts.augment import Augment
from pit_core.parts.embed import Encoder, embed, look_through
from pit_core.parts.embed_ray import Cluster, _place, embed_on_ray
from pit_core.parts.views import Recipe

MISSING = "Ray is not installed; pip install -e '.[scale]'"
ray = pytest.importorskip("ray", reason=MISSING)
pytest.importorskip("pyarrow", reason=MISSING)

import ray_encoders  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = Recipe(tiny_parts.PIXELS, Augment(use_ref=True), views=2)


@pytest.fixture(scope="module")
def cluster(root: Path) -> Iterator[str]:
    """The address of a small Ray, one for all tests."""
    paths = os.pathsep.join([str(root), str(root / "tests" / "support")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)  # its processes inherit it
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # 15 is Ray's: a busy computer would hardly get to them
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init("local", num_cpus=2, object_store_memory=80 << 20, **options)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_parts.write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def plain(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("plain")
    embed(manifest, out, Encoder(tiny_parts.image_encoder(), tiny_parts.adapter()), RECIPE, shard_size=1)
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    """What is there when all is done, by name."""
    patterns = ("shards/*", "white-*", "index.json")
    return {str(p.relative_to(out)): p.read_bytes() for pattern in patterns for p in out.glob(pattern)}


def encoded(log: Path) -> list[int]:
    """How many pictures each encoded shard had."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def test_the_command_makes_the_same_files(
    cluster: str, manifest: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    models = tiny_stack.save(tmp_path / "models")
    given = ("--image-encoder", models.image_encoder, "--ip-adapter", models.ip_adapter)
    for name, more in (("plain", ()), ("ray", ("--ray", "--actors", 1, "--workers", 1))):
        command = ("data", "embed", manifest, "--out", tmp_path / name, *given, "--shard-size", 4)
        code, text, errors = run(*command, "--device", "cpu", *more)
        assert code == 0 and "10 wholes in 3 shards, 3 of them encoded now" in text
        assert "Traceback" not in errors
    assert files(tmp_path / "plain") == files(tmp_path / "ray")


def test_a_killed_process_is_replaced_and_nothing_is_made_twice(
    cluster: str, manifest: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    load = partial(ray_encoders.load, ray_encoders.Dying, log)
    done = embed_on_ray(manifest, tmp_path / "out", load, RECIPE, shard_size=1, quiet=True)
    assert (tmp_path / "killed").exists()
    assert done.made == len(encoded(log)) == 10
    assert files(tmp_path / "out") == plain
    # Nothing is left to do.
    again = embed_on_ray(manifest, tmp_path / "out", load, RECIPE, shard_size=1, quiet=True)
    assert again.made == 0 and len(encoded(log)) == 10


def test_a_killed_run_goes_on_where_it_was(
    cluster: str, manifest: Path, plain: dict[str, bytes], tmp_path: Path
) -> None:
    out, logs = tmp_path / "out", [tmp_path / "first", tmp_path / "second"]
    code = f"""
import sys, ray_encoders
from functools import partial
from pit_core.parts.augment import Augment
from pit_core.parts.embed_ray import Cluster, embed_on_ray
from pit_core.parts.views import Recipe
from pathlib import Path
load = partial(ray_encoders.load, ray_encoders.Watched, Path(sys.argv[3]), 0.5)
recipe = Recipe({RECIPE.pixels}, Augment(use_ref=True), views={RECIPE.views})
embed_on_ray(sys.argv[1], sys.argv[2], load, recipe, Cluster({cluster!r}), shard_size=1, quiet=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(manifest), str(out), str(logs[0])])
    while child.poll() is None and not list(out.glob("shards/*.tar")):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    child.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shards/*.tar")}
    assert 1 <= len(kept) < 10 and not (out / "index.json").exists()
    load = partial(ray_encoders.load, ray_encoders.Watched, logs[1])
    done = embed_on_ray(manifest, out, load, RECIPE, shard_size=1, quiet=True)
    assert done.made == len(encoded(logs[1])) <= 10 - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert files(out) == plain


def test_a_picture_that_breaks_meanwhile_is_named_in_a_sentence(cluster: str, tmp_path: Path) -> None:
    source = tiny_parts.write_set(tmp_path / "set", 3)
    look_through(source, tmp_path / "out", quiet=True)
    broken = source.parent / "2.png"
    status = broken.stat()
    broken.write_bytes(b"x" * status.st_size)
    os.utime(broken, ns=(status.st_atime_ns, status.st_mtime_ns))
    load = partial(ray_encoders.load, ray_encoders.Watched, tmp_path / "log")
    with pytest.raises(PitError, match=r"^'2\.png' is not a picture[^\n]*$"):
        embed_on_ray(source, tmp_path / "out", load, Recipe(), quiet=True)


def test_more_than_the_cluster_has_is_refused() -> None:
    there = {"CPU": 8.0, "GPU": 4.0}
    assert _place(Cluster(), there) == (4, 1.0)
    assert _place(Cluster(gpus=0.5), there) == (7, 0.5)  # one CPU is left for the others
    assert _place(Cluster(), {"CPU": 2.0}) == (1, 0.0)
    for cluster, resources in (
        (Cluster(actors=5), there),
        (Cluster(gpus=5.0), there),
        (Cluster(gpus=1.0), {"CPU": 2.0}),
        (Cluster(actors=2), {"CPU": 2.0}),
    ):
        with pytest.raises(PitError, match=r"ask for fewer\.$"):
            _place(cluster, resources)
