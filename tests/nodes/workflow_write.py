"""Writes workflows/*.json out of workflow_graphs.py, through the page of a real ComfyUI.

    python tests/nodes/workflow_write.py [NAME ...]

Without names all are written. Needs what the browser tests need: a ComfyUI, playwright and a Chromium. Run it
again after a change of a graph or of a node's inputs.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

import workflow_graphs as graphs
from workflow_page import Page, opened
from workflow_server import FOLDER, serving, some_host

WIDTH, GAP = 310, 36  # of a node, and between nodes
HEAD = 30  # a node's title, above its position
PADDING, TITLE = 30, 80  # of a group: around its nodes, and from its top to the first of them
NOTE_WIDTH, NOTE_LINE, NOTE_LETTERS = 400, 22, 46
SHOWS_PICTURES = {"PreviewImage", "SaveImage", "PiTSweepGrid"}
LOAD_IMAGE = 340
PICTURE, REPORT = 260, 90  # pixels left under what shows pictures, and under what tells a text
VUE = (1.1, 36)  # how much taller the newer of the two renderers draws a node: factor and pixels
VIEW, SIDEBAR = 1800, 110  # pixels: the part of a window that a graph should fit into, and what is left of it
READABLE = 0.6  # the least scale at which the older renderer writes texts

MEASURE = "() => app.graph.nodes.map((n) => [Number(n.id), n.computeSize()[1]])"
ARRANGE = """(boxes, files, groups, notes) => {
  for (const [id, x, y, width, height] of boxes) {
    const node = app.graph.getNodeById(id);
    node.pos = [x, y];
    node.size = [width, height];
    const after = node.widgets?.find((widget) => widget.name === "control_after_generate");
    if (after) after.value = "fixed";
  }
  for (const [id, models] of files) app.graph.getNodeById(id).properties.models = models;
  for (const [title, x, y, width, height] of groups) {
    const group = new LiteGraph.LGraphGroup(title);
    group.pos = [x, y];
    group.size = [width, height];
    app.graph.add(group);
  }
  for (const [title, text, x, y, width, height] of notes) {
    const note = LiteGraph.createNode("MarkdownNote");
    app.graph.add(note);
    note.title = title;
    note.widgets[0].value = text;
    note.pos = [x, y];
    note.size = [width, height];
    note.color = "#432";
    note.bgcolor = "#653";
  }
  return JSON.stringify(app.graph.serialize());
}"""

Box = tuple[Any, ...]
"""(node's id or group's title, x, y, width, height)."""


@dataclass
class Layout:
    boxes: list[Box]
    groups: list[Box]
    right: float = 0


def main(names: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, serving(some_host(), Path(folder)) as server:
        server.place_files()
        with opened(server.address) as page:
            page.open(vue=False)
            for workflow in graphs.all_workflows():
                if names and workflow.name not in names:
                    continue
                path = FOLDER / f"{workflow.name}.json"
                path.write_text(json.dumps(converted(page, workflow), indent=1) + "\n", "utf-8")
                print(path.name)  # noqa: T201


def converted(page: Page, workflow: graphs.Workflow) -> dict[str, Any]:
    """The graph as the page saves it: laid out, seeds fixed, notes beside it."""
    page.run("(api, name) => app.loadApiJson(api, name)", _titled(workflow), workflow.name)
    page.page.wait_for_timeout(1000)
    plan = layout(workflow, dict(page.run(MEASURE)))
    made = json.loads(page.run(ARRANGE, plan.boxes, files(workflow), plan.groups, notes(workflow)))
    made["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, workflow.name))
    scale = round(max(READABLE, min(1.0, VIEW / (plan.right + NOTE_WIDTH + GAP))), 2)
    left, top = NOTE_WIDTH + GAP + SIDEBAR / scale, SIDEBAR / scale
    made["extra"] = {"ds": {"scale": scale, "offset": [round(left), round(top)]}}
    return made


def _titled(workflow: graphs.Workflow) -> dict[str, Any]:
    api = workflow.api()
    for node in workflow.nodes:
        if node.title:
            api[str(node.id)]["_meta"] = {"title": node.title}
    return api


def layout(workflow: graphs.Workflow, heights: dict[int, float]) -> Layout:
    """Groups from left to right, in each its columns, in each its nodes from top to bottom."""
    plan = Layout([], [])
    x = 0.0
    for title, nodes in workflow.groups.items():
        left, bottom = x, 0.0
        for column in sorted({node.column for node in nodes}):
            y = float(TITLE)
            for node in (each for each in nodes if each.column == column):
                height = _height(node, heights[node.id])
                plan.boxes.append((node.id, x + PADDING, y, WIDTH, height))
                y += height + HEAD + GAP
            x += WIDTH + GAP
            bottom = max(bottom, y - HEAD - GAP + PADDING)
        x += 2 * PADDING - GAP
        plan.groups.append((title, left, 0, x - left, bottom))
        plan.right = x
        x += GAP
    return plan


def _height(node: graphs.Node, least: float) -> float:
    if node.kind == "LoadImage":  # its least height is with a picture already
        return LOAD_IMAGE
    factor, more = VUE
    least = max(least, 120.0) if node.kind == "CLIPTextEncode" else factor * least + more
    least += PICTURE if node.kind in SHOWS_PICTURES else 0
    if node.kind == "PiTFindDirection":  # the longest of the reports
        return round(least + 2 * REPORT)
    tells = node.kind.startswith(("PiTLoad", "PiTSave", "PiTIPLoRA"))
    return round(least + (REPORT if tells else 0))


def files(workflow: graphs.Workflow) -> list[tuple[int, list[dict[str, str]]]]:
    """(node's id, what the page tells and offers of files that are missing)."""
    found = [(node.id, [(name, graphs.FILES[name]) for name in node.files()]) for node in workflow.nodes]
    return [
        (id, [{"name": name, "url": file.url, "directory": file.folder} for name, file in named])
        for id, named in found
        if named
    ]


def notes(workflow: graphs.Workflow) -> list[Box]:
    """(title, text, x, y, width, height), left of the groups."""
    texts = {"What to do": workflow.note, "Files": graphs.files_note(workflow)}
    made, y = [], float(TITLE)
    for title, text in texts.items():
        if text:
            shown = re.sub(r"\]\([^)]*\)", "", text)  # links without their addresses
            lines = sum(1 + len(line) // NOTE_LETTERS for line in shown.splitlines())
            height = 60 + NOTE_LINE * lines
            made.append((title, text, -NOTE_WIDTH - GAP, y, NOTE_WIDTH, height))
            y += height + HEAD + GAP
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
