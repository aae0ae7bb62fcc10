"""The shipped workflows in ComfyUI's page, in a headless Chromium, with both renderers of nodes.

Screenshots are kept in the folder that PIT_SCREENSHOTS names, else in pytest's own.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_end_to_end import look_like_pictures
from workflow_graphs import all_workflows
from workflow_page import Page, opened
from workflow_server import FOLDER, WorkflowServer, missing_weights, serving

pytestmark = [pytest.mark.host, pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

GRAPHS = {workflow.name: workflow for workflow in all_workflows()}
BAD = """() => app.graph.nodes
  .filter((n) => n.has_errors || !(n.type in LiteGraph.registered_node_types)).map((n) => n.type)"""
BOXES = """() => app.graph.nodes.map((n) => {
  const element = document.querySelector(`[data-node-id="${n.id}"]`);
  const [width, height] = element ? [element.offsetWidth, element.offsetHeight - 30] : n.size;
  return [n.id, n.pos[0], n.pos[1] - 30, n.pos[0] + width, n.pos[1] + height];
})"""
FRAME = """(id) => {
  const node = app.graph.getNodeById(id), { scale, offset } = app.canvas.ds;
  const { left, top } = app.canvas.canvas.getBoundingClientRect();
  const [x, y] = [0, 1].map((i) => (node.pos[i] + offset[i]) * scale);
  return [left + x, top + y, node.size[0] * scale, node.size[1] * scale];
}"""
TOKENS, SAYS = "shown.safetensors", "2 rows of 4 tokens, width 32"
FIT = "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"


@pytest.fixture(scope="module")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkflowServer]:
    pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e .[browser]")
    with serving(comfyui, tmp_path_factory.mktemp("base")) as made:
        made.place_files()
        place_tokens(made.folder / "output/ip_tokens" / TOKENS)
        yield made


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "vue"])
def page(server: WorkflowServer, request: pytest.FixtureRequest) -> Iterator[Page]:
    with opened(server.address) as made:
        made.open(vue=request.param)
        yield made


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("PIT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def place_tokens(path: Path) -> None:
    from pit_core.ip_adapter.tokens import IPTokens, save_ip_tokens

    made = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    save_ip_tokens(path, IPTokens(made, 4))


def shipped(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def shoot(page: Page, folder: Path, name: str) -> None:
    page.page.screenshot(path=folder / f"{name}_{'vue' if page.vue else 'canvas'}.png")


def complaints(page: Page) -> list[str]:
    """What the page has against what it was given, on the screen and in the console."""
    wrong = re.compile(r".*(?:invalid workflow|missing node|zod).*", re.IGNORECASE)
    return [line for line in [*page.said, *page.text().splitlines()] if wrong.match(line)]


@pytest.mark.parametrize("name", GRAPHS)
def test_it_loads_without_a_complaint(page: Page, screenshots: Path, name: str) -> None:
    page.load(shipped(name), name)
    shoot(page, screenshots, name)
    assert page.run(BAD) == []
    assert complaints(page) == []
    assert page.prompt() == GRAPHS[name].api()
    page.run(FIT)
    page.page.wait_for_timeout(1000)
    assert overlapping(page) == []


def test_reports_and_pictures_are_shown_and_survive_another_tab(
    server: WorkflowServer, page: Page, screenshots: Path
) -> None:
    graph = {
        "1": {"class_type": "PiTLoadTokens", "inputs": {"file": TOKENS}},
        "2": {"class_type": "PiTPreviewTokens", "inputs": {"tokens": ["1", 0]}},
    }
    page.run("(api, name) => app.loadApiJson(api, name)", graph, "tokens")
    page.run(FIT)
    page.page.wait_for_timeout(1000)
    assert reports(page) == []
    before = colours(page, 2)
    assert finished_in(server, page)["status"]["status_str"] == "success"
    page.run(FIT)
    page.page.wait_for_timeout(1500)
    shoot(page, screenshots, "report")
    shown = reports(page)
    assert len(shown) == 2 and all(SAYS in text for text in shown)
    drawn = colours(page, 2)
    assert drawn > before + 50
    page.run("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    page.page.wait_for_timeout(1500)
    assert reports(page) == []
    page.run("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
    page.page.wait_for_timeout(2500)
    shoot(page, screenshots, "report_again")
    assert reports(page) == shown
    assert colours(page, 2) > before + (drawn - before) // 2


def reports(page: Page) -> list[str]:
    """The reports that can be seen, in the order of the page."""
    found = page.page.locator("pre", has_text="tokens").all()
    return [each.inner_text() for each in found if each.is_visible()]


def colours(page: Page, node: int) -> int:
    """How many different ones are seen in a node, as far as it is in the window."""
    x, y, width, height = page.run(FRAME, node)
    with Image.open(io.BytesIO(page.page.screenshot())) as shot:
        seen = shot.convert("RGB").crop((int(x), int(y), int(x + width), int(y + height)))
    return len(seen.getcolors(maxcolors=1 << 24) or [])


def finished_in(server: WorkflowServer, page: Page) -> dict[str, Any]:
    """Press Run; the history entry."""
    before = set(server.get("/history"))
    page.run("() => app.queuePrompt(0)")
    for _ in range(1200):
        if done := [entry for key, entry in server.get("/history").items() if key not in before]:
            page.page.wait_for_timeout(1500)
            return done[0]
        page.page.wait_for_timeout(500)
    raise AssertionError("the graph did not finish")


def overlapping(page: Page) -> list[tuple[int, int]]:
    boxes = page.run(BOXES)
    return [
        (a[0], b[0])
        for i, a in enumerate(boxes)
        for b in boxes[:i]
        if a[1] < b[3] and b[1] < a[3] and a[2] < b[4] and b[2] < a[4]
    ]


@pytest.mark.parametrize("name", [name for name, graph in GRAPHS.items() if not graph.full])
def test_the_miniature_runs_in_the_page(
    server: WorkflowServer, page: Page, screenshots: Path, name: str
) -> None:
    if missing := missing_weights():
        pytest.skip(f"the miniature has not been trained here: {missing} is missing")
    page.load(shipped(name), name)
    page.run(FIT)
    entry = finished_in(server, page)
    shoot(page, screenshots, f"{name}_run")
    assert entry["status"]["status_str"] == "success"
    for node in (str(each.id) for each in GRAPHS[name].nodes if each.kind == "SaveImage"):
        assert look_like_pictures(server.pictures(entry, node))
    assert overlapping(page) == []


def test_overlapping_nodes_are_noticed(page: Page) -> None:
    page.load(shipped("01_first_concept_miniature"), "crowded")
    page.run("() => { app.graph.getNodeById(2).pos = app.graph.getNodeById(1).pos; }")
    assert overlapping(page)


def test_a_broken_file_is_complained_of(page: Page) -> None:
    """So that silence means something. The last test, because the page keeps its complaint in sight."""
    broken = shipped("01_first_concept_miniature")
    broken["nodes"][0]["type"] = "PiTNoSuchNode"
    broken["nodes"][1]["pos"] = "nowhere"
    page.load(broken, "broken")
    assert complaints(page)
