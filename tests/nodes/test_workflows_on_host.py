"""The shipped workflows in a running ComfyUI: the server takes all of them, and runs the miniature's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_end_to_end import look_like_pictures
from workflow_graphs import Workflow, all_workflows
from workflow_server import FOLDER, WorkflowServer, missing_weights, serving

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(900)]

GRAPHS = {workflow.name: workflow for workflow in all_workflows()}
FULL = [name for name, graph in GRAPHS.items() if graph.full]
MINIATURE = [name for name, graph in GRAPHS.items() if not graph.full]


@pytest.fixture(scope="module")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkflowServer]:
    with serving(comfyui, tmp_path_factory.mktemp("base")) as made:
        made.place_files()
        yield made


@pytest.fixture(scope="module")
def comfy(server: WorkflowServer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments before a workflow's; offline, and with settings of its own."""
    if importlib.util.find_spec("comfy_cli") is None:
        pytest.skip("no comfy-cli: pip install -e .[browser]")
    home = tmp_path_factory.mktemp("home")
    (home / "nodes.json").write_text(json.dumps(server.get("/object_info")), "utf-8")
    _comfy(home, "tracking", "disable")
    return [str(home), "workflow", "validate", "--input", str(home / "nodes.json")]


def _comfy(home: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "comfy_cli", *arguments],
        env={**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_templates_are_listed(server: WorkflowServer) -> None:
    assert set(server.get("/workflow_templates")["piece-it-together"]) == set(GRAPHS)


@pytest.mark.parametrize("name", FULL)
def test_the_server_takes_it(server: WorkflowServer, name: str) -> None:
    """The graph is sound; it gets no further than to its files, which are empty here."""
    _, objections = server.submit(GRAPHS[name].api())
    assert objections == {}


def test_the_server_objects_to_a_file_that_is_not_there(server: WorkflowServer) -> None:
    graph = GRAPHS["01_first_concept_sdxl"].api()
    graph["1"]["inputs"]["ckpt_name"] = "another.safetensors"
    assert "value_not_in_list" in json.dumps(server.submit(graph))


@pytest.mark.parametrize("name", MINIATURE)
def test_the_miniature_runs_to_the_end(server: WorkflowServer, name: str) -> None:
    graph = GRAPHS[name]
    number, objections = server.submit(graph.api())
    assert number and objections == {}
    if missing := missing_weights():
        pytest.skip(f"the miniature has not been trained here: {missing} is missing")
    entry = server.finished(number)
    assert entry["status"]["status_str"] == "success", entry["status"]
    for node in (each for each in graph.nodes if each.kind == "SaveImage"):
        found = server.pictures(entry, str(node.id))
        assert len(found) == _count(graph) and look_like_pictures(found)


def _count(graph: Workflow) -> int:
    """How many pictures are saved: as many as were drawn, or one sheet of them."""
    if any(node.kind == "PiTSweepGrid" for node in graph.nodes):
        return 1
    sizes = (node.inputs["batch_size"] for node in graph.nodes if node.kind == "EmptyLatentImage")
    return next(sizes, 1)


@pytest.mark.parametrize("name", GRAPHS)
def test_comfy_cli_finds_it_valid(comfy: list[str], tmp_path: Path, name: str) -> None:
    """The graph, and the file that ships, which it makes a graph of by itself."""
    path = tmp_path / "api.json"
    path.write_text(json.dumps(GRAPHS[name].api()), "utf-8")
    for each in (path, FOLDER / f"{name}.json"):
        done = _comfy(*comfy, "--workflow", str(each))
        assert done.returncode == 0, done.stdout + done.stderr


def test_comfy_cli_finds_a_wrong_link_invalid(comfy: list[str], tmp_path: Path) -> None:
    graph = GRAPHS["01_first_concept_miniature"].api()
    decode = next(key for key, node in graph.items() if node["class_type"] == "VAEDecode")
    graph[decode]["inputs"]["samples"] = ["1", 0]
    path = tmp_path / "api.json"
    path.write_text(json.dumps(graph), "utf-8")
    assert _comfy(*comfy, "--workflow", str(path)).returncode != 0
