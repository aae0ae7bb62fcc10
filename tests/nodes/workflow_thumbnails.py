"""Runs the miniature's workflows in a real ComfyUI and makes thumbnails, workflows/*.jpg, of the results.

    python tests/nodes/workflow_thumbnails.py [NAME ...]

A full-size workflow gets its miniature twin's pictures, the one with Flux those that it would start from, and
one with a diptych, where no twin is there, the canvas that Flux is given; all say so. Needs a ComfyUI and the
miniature's trained weights. Without names all are made.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from workflow_canvas import canvas_of
from workflow_graphs import FLUX, Workflow, all_workflows
from workflow_server import FOLDER, WorkflowServer, missing_weights, serving, some_host

SIDE, TILE, RESULT = 512, 120, 384  # pixels: the thumbnail, a picture that went in, what came out
INK = (70, 70, 80)
BY_MINIATURE, BEFORE_FLUX = "drawn by the miniature", "drawn by the miniature, before Flux"
GIVEN_TO_FLUX = "what Flux is given"
FLUX_STARTS_FROM = "01_first_concept_miniature"

Pictures = list[Image.Image]


def main(names: Sequence[str]) -> None:
    if missing := missing_weights():
        sys.exit(f"The miniature's file '{missing}' is missing: train the miniature first.")
    chosen = {w.name: w for w in all_workflows() if not names or w.name in names}
    graphs = {w.name: w for w in all_workflows()}
    made: dict[str, tuple[Pictures, Pictures]] = {}
    for name in [name for name, workflow in chosen.items() if source_of(workflow) is None]:
        _save(name, compose(*canvas_of(name), GIVEN_TO_FLUX))
        del chosen[name]
    if not chosen:
        return
    with tempfile.TemporaryDirectory() as folder, serving(some_host(), Path(folder)) as server:
        for name, workflow in chosen.items():
            source = str(source_of(workflow))
            if source not in made:
                made[source] = pictures_of(server, graphs[source])
            _save(name, compose(*made[source], caption_of(workflow)))


def _save(name: str, thumbnail: Image.Image) -> None:
    thumbnail.save(FOLDER / f"{name}.jpg", quality=88, optimize=True)
    print(f"{name}.jpg")  # noqa: T201


def source_of(workflow: Workflow) -> str | None:
    """The workflow of the miniature whose pictures are shown; None where there is none."""
    if workflow.name.endswith("_flux"):
        twin = workflow.name.replace("_flux", "_miniature")
        return twin if twin in {w.name for w in all_workflows()} else None
    if FLUX in workflow.files():
        return FLUX_STARTS_FROM
    return workflow.name.replace("_sdxl", "_miniature")


def caption_of(workflow: Workflow) -> str:
    if source_of(workflow) is None:
        return GIVEN_TO_FLUX
    if workflow.full and workflow.name.endswith("_flux"):
        return BY_MINIATURE
    if FLUX in workflow.files():
        return BEFORE_FLUX
    return BY_MINIATURE if workflow.full else ""


def pictures_of(server: WorkflowServer, workflow: Workflow) -> tuple[Pictures, Pictures]:
    """Run a workflow: the samples that it took, and what it made. Raises RuntimeError when it fails."""
    entry = server.run(workflow.api())
    if entry["status"]["status_str"] != "success":
        raise RuntimeError(f"{workflow.name}: {entry['status']['messages'][-1]}")
    shown = {node.id: _read(server, entry, node.id) for node in workflow.nodes if _shows(node.kind)}
    samples = {str(n.inputs["images"]): shown[n.id] for n in workflow.nodes if n.kind == "PreviewImage"}
    picks = [node.inputs for node in workflow.nodes if node.kind == "ImageFromBatch"]
    taken = [samples[str(each["image"])][each["batch_index"]] for each in picks]
    return taken, [p for n in workflow.nodes if n.kind == "SaveImage" for p in shown[n.id]]


def _shows(kind: str) -> bool:
    return kind in ("SaveImage", "PreviewImage")


def _read(server: WorkflowServer, entry: dict[str, Any], node: int) -> Pictures:
    files = entry["outputs"][str(node)]["images"]
    return [
        Image.open(server.folder / each["type"] / each["subfolder"] / each["filename"]).convert("RGB")
        for each in files
    ]


def compose(taken: Pictures, made: Pictures, caption: str = "") -> Image.Image:
    """What went in, from top to bottom on the left, and what came out, as one square on the right."""
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    top = (SIDE - RESULT) // 2
    step = RESULT // max(3, len(taken))
    first = top + (RESULT - step * len(taken)) // 2
    side = min(TILE, step - 8)
    for i, picture in enumerate(taken):
        sheet.paste(_sized(picture, side), (4 + (TILE - side) // 2, first + i * step + (step - side) // 2))
    columns = next(n for n in range(1, 100) if n * n >= len(made))
    for i, picture in enumerate(made):
        x, y = i % columns * RESULT // columns, i // columns * RESULT // columns
        sheet.paste(_sized(picture, RESULT // columns), (SIDE - RESULT + x, top + y))
    if caption:
        font = ImageFont.load_default(size=20)
        ImageDraw.Draw(sheet).text((SIDE // 2, SIDE - top // 2), caption, INK, font, anchor="mm")
    return sheet


def _sized(picture: Image.Image, side: int) -> Image.Image:
    return ImageOps.pad(picture, (side, side), Image.Resampling.LANCZOS, color="white")


if __name__ == "__main__":
    main(sys.argv[1:])
