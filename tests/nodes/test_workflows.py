"""The shipped workflows as files: whole, tidy, and the graphs that workflow_graphs.py describes."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import workflow_graphs
from benches import ROOT
from workflow_graphs import FILES, Workflow, all_workflows

FOLDER = ROOT / "workflows"
NODES = json.loads(Path(__file__).with_name("schema.json").read_text("utf-8"))
GRAPHS = {workflow.name: workflow for workflow in all_workflows()}
WIDGETS = {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"}
NOTE = "MarkdownNote"
FAMILIES = ("_miniature", "_sdxl", "_flux")
TITLE_BAR = 30

File = dict[str, Any]


@pytest.fixture(params=sorted(GRAPHS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def file(name: str) -> File:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


@pytest.fixture
def graph(name: str) -> Workflow:
    return GRAPHS[name]


def ours(file: File) -> Iterator[tuple[File, File]]:
    """The pack's nodes with their record."""
    return ((node, NODES[node["type"]]) for node in file["nodes"] if node["type"].startswith("PiT"))


def test_every_graph_is_shipped_and_nothing_else() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(GRAPHS)


def test_every_workflow_has_a_miniature_twin_but_the_one_with_flux() -> None:
    kinds = {kind: {n[: -len(kind)] for n in GRAPHS if n.endswith(kind)} for kind in FAMILIES}
    assert kinds["_sdxl"] - kinds["_miniature"] == {"06_refined_by_flux"}
    assert kinds["_miniature"] <= kinds["_sdxl"] | kinds["_flux"]


def test_twins_differ_in_their_models_and_pictures_alone() -> None:
    given = {"PiTMiniatureSDXL", "ImageFromBatch", "PreviewImage"}
    loaders = {"CheckpointLoaderSimple", "CLIPVisionLoader", "LoadImage"}
    for name, graph in GRAPHS.items():
        twin = GRAPHS.get(name.replace("_miniature", "_sdxl"))
        if twin and not graph.full:
            kinds = [n.kind for n in graph.nodes if n.kind not in given]
            assert kinds == [n.kind for n in twin.nodes if n.kind not in loaders], name


def test_graphs_with_an_ip_lora_ship_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow_graphs, "WEIGHTS", tmp_path)
    assert not [w.name for w in all_workflows() if w.name.startswith(("08", "09"))]
    (tmp_path / "ip_lora_scene.safetensors").touch()
    (tmp_path / "ip_lora_sheet.safetensors").touch()
    made = {w.name: w for w in all_workflows() if w.name.startswith(("08", "09"))}
    names = ("08_scene_from_text", "09_character_sheet")
    assert set(made) == {f"{name}_{kind}" for name in names for kind in ("miniature", "sdxl")}
    for name, graph in made.items():
        (lora,) = (node for node in graph.nodes if node.kind == "PiTIPLoRA")
        assert set(lora.inputs) == {entry["id"] for entry in NODES["PiTIPLoRA"]["inputs"]}
        assert len(graph.note.splitlines()) == 3
        assert (str(lora.inputs["file"]) in FILES) == graph.full, name


def test_the_graph_with_b4m_ships_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow_graphs, "WEIGHTS", tmp_path)
    assert not [w.name for w in all_workflows() if w.name.startswith("10")]
    (tmp_path / "b4m_join_1_1.safetensors").touch()
    made = {w.name: w for w in all_workflows() if w.name.startswith("10")}
    assert set(made) == {f"10_content_and_style_{kind}" for kind in ("miniature", "sdxl")}
    for graph in made.values():
        dials = [node for node in graph.nodes if node.kind == "PiTApplyB4M"]
        assert {(n.inputs["content"], n.inputs["style"]) for n in dials} == {(0, 0), (0, 1), (1, 0), (1, 1)}
        for node in (each for each in graph.nodes if each.kind.endswith("B4M")):
            assert set(node.inputs) == {entry["id"] for entry in NODES[node.kind]["inputs"]}
        assert len(graph.files()) == (2 if graph.full else 0) and len(graph.note.splitlines()) == 3


def test_twins_with_a_diptych_differ_in_their_models_pictures_and_masks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workflow_graphs, "WEIGHTS", tmp_path)
    diptychs = [w.name for w in all_workflows() if "diptych" in w.name]
    assert [name[:2] for name in diptychs] == ["11", "11", "12", "13", "14"]  # without the twins' weights
    (tmp_path / "flux_fill").mkdir()
    (tmp_path / "flux_fill/diffusion_pytorch_model.safetensors").touch()
    made = {w.name: w for w in all_workflows() if "diptych" in w.name}
    twins = {name: graph for name, graph in made.items() if not graph.full}
    assert set(twins) == {"12_diptych_fill_miniature", "14_diptych_edit_miniature"}
    given = {"PiTMiniatureFlux", "PiTMiniatureSDXL", "ImageFromBatch", "PreviewImage"}
    given |= {"SolidMask", "MaskComposite", "InvertMask"}
    loaders = {"UNETLoader", "DualCLIPLoader", "VAELoader", "LoadImage"}
    for name, graph in twins.items():
        full = made[name.replace("_miniature", "_flux")]
        kinds, others = ([n.kind for n in w.nodes if n.kind not in given | loaders] for w in (graph, full))
        assert kinds == others and graph.files() == []
        for node in (each for each in graph.nodes if each.kind.startswith("PiTDiptych")):
            known = {entry["id"] for entry in NODES[node.kind]["inputs"]}
            assert set(node.inputs) <= known and len(known - set(node.inputs)) <= 3


def test_it_is_a_file_of_the_page_not_of_the_api(file: File) -> None:
    assert file["version"] == 0.4
    assert isinstance(file["nodes"], list) and isinstance(file["links"], list)
    ids = [node["id"] for node in file["nodes"]]
    assert len(set(ids)) == len(ids) and max(ids) <= file["last_node_id"]
    assert max(link[0] for link in file["links"]) <= file["last_link_id"]
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", file["id"])


def test_every_link_has_two_ends_that_know_it(file: File) -> None:
    nodes = {node["id"]: node for node in file["nodes"]}
    for link, source, output, target, place, kind in file["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[source]["outputs"][output]["type"] == kind
        assert nodes[target]["inputs"][place]["link"] == link
        assert nodes[target]["inputs"][place]["type"] == kind
    known = {link[0] for link in file["links"]}
    ends = [entry["link"] for node in file["nodes"] for entry in node.get("inputs", ())]
    starts = [
        link for node in file["nodes"] for out in node.get("outputs", ()) for link in out["links"] or ()
    ]
    assert {link for link in ends if link is not None} == known == set(starts)


def test_the_packs_nodes_are_as_recorded(file: File) -> None:
    for node, record in ours(file):
        assert [[out["type"], out["name"]] for out in node["outputs"]] == record["outputs"], node["type"]
        sockets = {entry["name"]: entry["type"] for entry in node["inputs"]}
        for entry in record["inputs"]:
            if entry["type"] != "COMFY_AUTOGROW_V3":
                assert sockets.pop(entry["id"]) == entry["type"], (node["type"], entry["id"])
                continue
            grown = re.compile(rf"{entry['id']}\.{entry['template']['prefix']}\d+")
            for socket in [name for name in sockets if grown.fullmatch(name)]:
                assert sockets.pop(socket) == entry["template"]["input"]["type"]
        assert not sockets, node["type"]


def test_the_packs_nodes_have_a_value_for_each_widget(file: File) -> None:
    for node, record in ours(file):
        sockets = {entry["name"] for entry in node["inputs"] if "widget" not in entry}
        widgets = (entry["id"] for entry in record["inputs"] if entry["type"] in WIDGETS)
        wanted = [name for name in widgets if name not in sockets]
        seeds = wanted.count("seed")  # each is followed by what happens to it after a run
        assert len(node.get("widgets_values", [])) == len(wanted) + seeds, node["type"]
        assert set(wanted) <= set(node.get("widgets_values_named", {})), node["type"]
        for entry in record["inputs"]:
            if "options" in entry:
                assert node["widgets_values_named"][entry["id"]] in entry["options"], node["type"]


def test_seeds_are_fixed(file: File) -> None:
    seeded = [node for node in file["nodes"] if "seed" in node.get("widgets_values_named", {})]
    assert seeded
    for node in seeded:
        assert node["widgets_values_named"]["control_after_generate"] == "fixed"
        assert "fixed" in node["widgets_values"]


def test_it_is_the_graph_that_is_described(file: File, graph: Workflow) -> None:
    """Whoever changes a graph runs workflow_write.py; whoever edits a file by hand changes the graph, too."""
    sources = {link: [str(source), output] for link, source, output, *_ in file["links"]}
    found = {}
    for node in file["nodes"]:
        if node["type"] == NOTE:
            continue
        values = dict(node.get("widgets_values_named", {}))
        values.pop("control_after_generate", None)
        values.pop("upload", None)
        linked = {
            entry["name"]: sources[entry["link"]] for entry in node["inputs"] if entry["link"] is not None
        }
        found[str(node["id"])] = {"class_type": node["type"], "inputs": {**values, **linked}}
    assert found == graph.api()


def test_the_notes_say_what_to_do_in_three_lines_and_where_files_go(file: File, graph: Workflow) -> None:
    notes = [node["widgets_values"][0] for node in file["nodes"] if node["type"] == NOTE]
    assert notes[0] == graph.note and len(notes[0].splitlines()) == 3
    assert len(notes) == (2 if graph.full else 1)
    for name in graph.files():
        assert f"**models/{FILES[name].folder}**: [{name}]({FILES[name].url})" in notes[1]
    if graph.full:
        assert "not run" in notes[1] or "neither" in notes[1]


def test_missing_files_are_offered_under_the_name_that_is_chosen(file: File, graph: Workflow) -> None:
    told = {entry["name"]: entry for node in file["nodes"] for entry in node["properties"].get("models", ())}
    assert set(told) == set(graph.files())
    for name, entry in told.items():
        assert (entry["directory"], entry["url"]) == (FILES[name].folder, FILES[name].url)


def test_names_of_files_have_no_folders(graph: Workflow) -> None:
    """Windows lists them with backslashes, and a name with a slash would not be found there."""
    assert not [name for name in graph.files() if "/" in name or "\\" in name]


def test_the_miniature_asks_for_no_file(graph: Workflow) -> None:
    if not graph.full:
        assert graph.files() == [] and not [n for n in graph.nodes if n.kind == "LoadImage"]


def _box(node: File) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_BAR, x + width, y + height


def test_nodes_do_not_overlap_and_every_one_is_in_a_group(file: File) -> None:
    boxes = {node["id"]: _box(node) for node in file["nodes"]}
    for (a, one), (b, other) in combinations(boxes.items(), 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (a, b)
    frames = [group["bounding"] for group in file["groups"]]
    for node in (each for each in file["nodes"] if each["type"] != NOTE):
        x, y, right, bottom = boxes[node["id"]]
        inside = [gx <= x and gy <= y and right <= gx + w and bottom <= gy + h for gx, gy, w, h in frames]
        assert sum(inside) == 1, node["type"]


def test_there_is_room_for_pictures(file: File) -> None:
    shown = [node for node in file["nodes"] if node["type"] in ("SaveImage", "PreviewImage")]
    assert shown
    assert min(node["size"][1] for node in shown) >= 250 + TITLE_BAR


def test_links_run_from_left_to_right_between_groups(file: File) -> None:
    left = {node["id"]: node["pos"][0] for node in file["nodes"]}
    assert [link for link in file["links"] if left[link[1]] > left[link[3]]] == []
