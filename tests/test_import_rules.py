"""The floor plan holds: imports run downwards only, start-up is cheap, and the pack loads under any name."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

# What ComfyUI loads; everything else in pit_core may be heavy.
LIGHT = (
    "b4m",
    "diptych",
    "directions",
    "errors",
    "files",
    "flow",
    "ip_adapter",
    "ip_prior",
    "lora",
    "parts.canvas",
)
HEAVY = ("accelerate", "diffusers", "matplotlib", "transformers")


def _run(script: str, *arguments: str | Path, cwd: Path) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def _sources(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((root / folder).rglob("*.py"))]


def test_layers_and_circles(root: Path) -> None:
    script = """
from importlinter.cli import lint_imports
raise SystemExit(lint_imports(no_cache=True, no_logo=True))
"""
    _run(script, cwd=root)


def test_the_pack_loads_by_path_without_comfyui(root: Path, tmp_path: Path) -> None:
    """As ComfyUI loads it: under a name made from its path, with ComfyUI's own `nodes` module around."""
    (tmp_path / "nodes.py").write_text("HOST = True\n")
    script = """
import importlib.util, json, sys
import nodes
name, root = "custom_nodes.some pack-1", sys.argv[1]
spec = importlib.util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules[name] = pack
spec.loader.exec_module(pack)
assert nodes.HOST and "pit_core" not in sys.modules
public = {key: getattr(pack, key) for key in pack.__all__}
public["NODE_CLASS_MAPPINGS"] = sorted(public["NODE_CLASS_MAPPINGS"])
print(json.dumps([public, sorted(sys.modules)]))
"""
    public, loaded = json.loads(_run(script, root, cwd=tmp_path))
    assert set(public) <= {"NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"}
    assert (root / public["WEB_DIRECTORY"]).is_dir()
    assert all(name.startswith("PiT") for name in public["NODE_CLASS_MAPPINGS"])
    assert not set(HEAVY) & set(loaded)


def test_importing_what_comfyui_uses_pulls_in_nothing_heavy(root: Path) -> None:
    modules = []
    for path in _sources(root, "pit_core"):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if any(f"{name}.".startswith(f"pit_core.{light}.") for light in LIGHT):
            modules.append(name)
    assert "pit_core.errors" in modules
    script = """
import importlib, json, sys
culprits = {}
for name in sys.argv[2:]:
    importlib.import_module(name)
    for heavy in json.loads(sys.argv[1]):
        if heavy in sys.modules:
            culprits.setdefault(heavy, name)
print(json.dumps(culprits))
"""
    assert json.loads(_run(script, json.dumps(HEAVY), *modules, cwd=root)) == {}


@pytest.mark.parametrize("folder", ["pit_core", "nodes"])
def test_imports_inside_the_pack_are_relative(root: Path, folder: str) -> None:
    """An absolute `pit_core` would be a second copy of the library; an absolute `nodes` is ComfyUI's."""
    absolute = []
    for path in _sources(root, folder):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            own = [name for name in names if name.split(".")[0] in ("pit_core", "nodes")]
            absolute += [f"{path.relative_to(root)}:{node.lineno} imports {name}" for name in own]
    assert absolute == []


def test_only_the_host_file_knows_comfyui(root: Path) -> None:
    """`comfy_api`, the published node interface, is for every node; the internals are for one file."""
    internals = ("comfy", "comfy_execution", "comfy_extras", "execution", "folder_paths", "server")
    found = []
    for path in _sources(root, "nodes"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            if path.name != "host.py" and any(name.split(".")[0] in internals for name in names):
                found.append(f"{path.relative_to(root)}:{node.lineno}")
    assert found == []
