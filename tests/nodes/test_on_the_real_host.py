"""All tests of this folder once more, in ComfyUI itself; and what the host says of the pack."""

import json
from pathlib import Path

import pytest
import real_host

HERE = Path(__file__).resolve().parent

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(1300)]


def test_the_node_tests_pass_in_comfyui(comfyui: Path) -> None:
    if real_host.run(comfyui, "-c", "import pytest", timeout=120).returncode:
        pytest.skip("the host's interpreter has no pytest; install it there")
    options = [
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "-c",
        str(real_host.ROOT / "pyproject.toml"),
    ]
    options += ["--rootdir", str(real_host.ROOT)]
    done = real_host.run(comfyui, "-m", "pytest", *options, str(HERE), timeout=1200)
    print(done.stdout[-2000:])  # noqa: T201
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_pack_starts_without_heavy_libraries(comfyui: Path) -> None:
    """None is so much as asked for: the host's own transformers would hide that it was.

    How long the start takes: benchmarks/bench_start.py.
    """
    script = """
import builtins, json, sys
root, tests = sys.argv[1:3]
sys.path[:0] = [tests, tests + "/..", "."]
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import nodes
import benches
asked, plain = set(), builtins.__import__
def watching(name, *rest, **options):
    asked.add(name.partition(".")[0])
    return plain(name, *rest, **options)
builtins.__import__ = watching
pack = benches.load_pack()
print(json.dumps({
    "nodes": len(pack.NODE_CLASS_MAPPINGS),
    "heavy": sorted({"diffusers", "transformers", "accelerate", "matplotlib"} & asked),
    "seen": "torch" in asked,
}))
"""
    done = real_host.run(comfyui, "-c", script, str(real_host.ROOT), str(HERE), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    nodes = len(list((real_host.ROOT / "js/docs").glob("*.md")))
    assert found == {"nodes": nodes, "heavy": [], "seen": True}
