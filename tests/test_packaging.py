"""What the repository holds, and what of it the Comfy Registry's archive would hold."""

import ast
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from pathspec import GitIgnoreSpec

import pit_core

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOP_LEVEL = {
    *("__init__.py", "nodes", "pit_core", "workflows", "js", "locales"),
    *("docs", "benchmarks", "tests", ".ci"),
    *("pyproject.toml", "requirements.txt", "constraints.txt", "Makefile"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    *(".comfyignore", ".gitattributes", ".gitignore"),
}
WEIGHTS_BYTES = 24_000_000
ARCHIVE_BYTES = 32_000_000
BINARY = {".jpg", ".jpeg", ".png", ".webp", ".safetensors", ".pt", ".bin", ".ckpt", ".npz"}
PLACEHOLDERS = re.compile(r"\byour-[\w-]+")


@pytest.fixture(scope="module")
def tracked(root: Path) -> list[str]:
    """The files under version control, as paths below the root."""
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return [path for path in listing.stdout.split("\0") if path and (root / path).exists()]


@pytest.fixture(scope="module")
def ignored(root: Path) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines((root / ".comfyignore").read_text("utf-8").splitlines())


@pytest.fixture(scope="module")
def archive(tracked: list[str], ignored: GitIgnoreSpec) -> list[str]:
    """The files that publishing packs: those under version control less what .comfyignore names."""
    return [path for path in tracked if not ignored.match_file(path)]


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text("utf-8"))


def _size(root: Path, paths: list[str]) -> int:
    return sum((root / path).stat().st_size for path in paths)


# the repository


def test_the_top_level_is_the_floor_plan(tracked: list[str]) -> None:
    assert {PurePosixPath(path).parts[0] for path in tracked} == TOP_LEVEL


def test_no_line_names_a_path_of_somebodys_machine(root: Path, tracked: list[str]) -> None:
    personal = re.compile(r"(?<![\w.])(/(home|root|Users|work|opt|mnt|srv)/\w|[A-Z]:\\+Users\\)")
    lines = []
    for path in tracked:
        if PurePosixPath(path).suffix not in BINARY:
            text = (root / path).read_text("utf-8").splitlines()
            lines += [
                f"{path}:{n}: {line.strip()[:100]}" for n, line in enumerate(text, 1) if personal.search(line)
            ]
    assert lines == []


def test_the_weights_are_small_enough_to_clone(root: Path, tracked: list[str]) -> None:
    weights = [path for path in tracked if path.startswith("pit_core/miniature/weights/")]
    assert _size(root, weights) <= WEIGHTS_BYTES


def test_nothing_is_a_git_lfs_pointer(root: Path, tracked: list[str]) -> None:
    """The pack is installed by plain clones, which would leave the pointers in the weights' place."""
    assert [path for path in tracked if b"git-lfs" in (root / path).read_bytes()[:60]] == []


# the archive


def test_the_archive_holds_the_pack_and_leaves_out_the_workshop(archive: list[str]) -> None:
    top = {PurePosixPath(path).parts[0] for path in archive}
    assert {"__init__.py", "nodes", "pit_core", "js", "pyproject.toml", "requirements.txt", "LICENSE"} <= top
    assert not top & {"tests", "benchmarks", "docs", ".ci", ".github", "Makefile"}


def test_leaving_out_the_workshop_does_not_reach_into_the_pack(ignored: GitIgnoreSpec) -> None:
    """Node help is in a folder named docs, too."""
    for path in ("js/docs/PiTEncodeParts.md", "pit_core/miniature/tests/x.py", "locales/en/main.json"):
        assert not ignored.match_file(path)


def test_the_archive_is_small(root: Path, archive: list[str]) -> None:
    assert _size(root, archive) <= ARCHIVE_BYTES


def test_the_archive_holds_no_bundled_scripts(root: Path, archive: list[str]) -> None:
    scripts = [path for path in archive if path.endswith((".js", ".mjs", ".map"))]
    assert not [path for path in scripts if path.endswith((".min.js", ".map"))]
    long_lines = [
        p for p in scripts if max(map(len, (root / p).read_text("utf-8").splitlines()), default=0) > 300
    ]
    assert long_lines == []


def test_the_archive_passes_the_scanner(root: Path, archive: list[str]) -> None:
    """No way out of the process: shells, the environment, HTTP libraries, code from text, obfuscation."""
    found = []
    for path in archive:
        if path.endswith(".py"):
            text = (root / path).read_text("utf-8")
            found += [f"{path}:{line}: {what}" for line, what in _flagged(text)]
    assert found == []


def test_the_archive_passes_comfy_tests_look_at_its_lines(root: Path, archive: list[str]) -> None:
    """It takes layers and devices that are named outright for models that the host cannot manage."""
    found = []
    for path in archive:
        if path.endswith(".py"):
            lines = enumerate((root / path).read_text("utf-8").splitlines(), 1)
            found += [f"{path}:{n}: {line.strip()}" for n, line in lines if UNMANAGED.search(line)]
    assert found == []


UNMANAGED = re.compile(r"\bnn\.Linear\(|\.cuda\(")
CALLS = {"eval()", "exec()", "compile()", "__import__()"}
MODULES = {"subprocess", "requests", "pty", "ctypes", "marshal", "base64"}
ATTRIBUTES = {"os.environ", "os.getenv", "os.putenv", "os.system", "os.popen"}
# The Registry reads text as well, so a word in a comment counts.
WORDS = re.compile(r"\bsubprocess\b|os\.environ|(?<![\w.])(?:eval|exec)\(")


def _flagged(source: str) -> list[tuple[int, str]]:
    used = [(node.lineno, name) for node in ast.walk(ast.parse(source)) for name in _names(node)]
    bad = [(line, name) for line, name in used if name in ATTRIBUTES | CALLS or name.split(".")[0] in MODULES]
    lines = enumerate(source.splitlines(), 1)
    return bad + [(number, line.strip()) for number, line in lines if WORDS.search(line)]


def _names(node: ast.AST) -> list[str]:
    """What a node of the syntax tree imports, or uses of `os`, or calls of the forbidden builtins."""
    match node:
        case ast.Call(func=ast.Name(id=name)) if f"{name}()" in CALLS:
            return [f"{name}()"]
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            return [f"{name}.{attribute}"] if name == "os" else []
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            return [f"{module}.{alias.name}" for alias in names]
    return []


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "from subprocess import run",
        "import requests.sessions",
        "import os\nos.environ['A']",
        "from os import environ",
        "eval('1')",
        "x = exec('1')",
        "# calls subprocess",
        "__import__('x')",
    ],
)
def test_the_scanner_sees(source: str) -> None:
    assert _flagged(source)


@pytest.mark.parametrize("source", ["model.eval()", "import re\nre.compile('x')", "def retrieval(): pass"])
def test_the_scanner_lets_pass(source: str) -> None:
    assert not _flagged(source)


# pyproject.toml


def test_the_registry_finds_what_it_asks_for(root: Path, project: dict) -> None:
    package, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z](?:[._-]?[A-Za-z0-9])*", package["name"]) and len(package["name"]) < 100
    assert "comfyui" not in package["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", package["version"])
    assert package["version"] == pit_core.__version__
    assert package["description"] and package["urls"]["Repository"].startswith("https://")
    assert (root / package["license"]["file"]).is_file() and (root / package["readme"]).is_file()
    assert {"PublisherId", "DisplayName", "Icon", "requires-comfyui", "includes"} <= comfy.keys()
    assert "web" not in comfy, "WEB_DIRECTORY says where the scripts are; naming it twice loads them twice"


def test_installing_the_pack_leaves_comfyuis_own_packages_alone(root: Path, project: dict) -> None:
    assert project["project"]["dynamic"] == ["dependencies"]
    lines = (root / "requirements.txt").read_text("utf-8").splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    assert not [
        str(r) for r in wanted if r.name in ("torch", "torchvision", "torchaudio", "triton", "xformers")
    ]
    assert not [str(r) for r in wanted if r.name == "numpy" and r.specifier]
    assert not [str(r) for r in wanted if any("<" in s.operator or s.operator == "==" for s in r.specifier)]


def test_torch_is_named_by_the_constraints_alone(root: Path, project: dict) -> None:
    extras = project["project"]["optional-dependencies"]
    assert {"headless", "train", "scale", "dev"} <= extras.keys()
    assert not [
        line for lines in extras.values() for line in lines if Requirement(line).name.startswith("torch")
    ]
    assert "torch==2.13.0" in (root / "constraints.txt").read_text("utf-8").splitlines()


def test_the_changelog_knows_the_version(root: Path) -> None:
    assert f"## [{pit_core.__version__}]" in (root / "CHANGELOG.md").read_text("utf-8")


def test_placeholders_are_where_a_publisher_looks_for_them(root: Path, archive: list[str]) -> None:
    """Account, address and picture are nobody's yet; all of them stand in pyproject.toml."""
    with_placeholders = {
        path
        for path in archive
        if PurePosixPath(path).suffix in (".py", ".toml", ".txt", ".json", ".js")
        and PLACEHOLDERS.search((root / path).read_text("utf-8"))
    }
    assert with_placeholders <= {"pyproject.toml"}
