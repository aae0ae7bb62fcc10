"""What helps on the page: a help page for each node, English texts for translators, reports, scripts."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from benches import ROOT, Bench, DoubleBench

PAGES = ROOT / "js" / "docs"
ENGLISH = ROOT / "locales" / "en"
SCRIPTS = sorted((ROOT / "js").rglob("*.js"))
SECTIONS = ["Inputs", "Outputs", "When something goes wrong", "Example"]
CORE_NODES = {
    *("Apply ControlNet Inpainting (AliMama)", "InpaintModelConditioning"),
    *("Load Diffusion Model", "Save Image"),
    *("CLIP Text Encode (Prompt)", "Conditioning Zero Out", "Empty Latent Image", "Get Image from Batch"),
    *("Invert Mask", "Load LoRA", "Load LoRA (Model and CLIP)"),
    *("Join Image with Alpha", "KSampler", "Load CLIP Vision", "Load Checkpoint", "Load Image"),
    *("Preview as Text", "Remove Background", "VAE Decode"),
}
MAIN = {
    "nodeCategories": {"Piece it Together": "Piece it Together"},
    "dataTypes": {
        "PIT_B4M": "B4M",
        "PIT_DIPTYCH_LAYOUT": "Diptych layout",
        "PIT_DIRECTION": "Direction",
        "PIT_IP_ADAPTER": "IP-Adapter",
        "PIT_IP_PRIOR": "IP-Prior",
        "PIT_IP_TOKENS": "IP tokens",
    },
}


@pytest.fixture(scope="module")
def schemas(bench: Bench) -> dict[str, Any]:
    return {name: node.define_schema() for name, node in bench.pack.NODE_CLASS_MAPPINGS.items()}


# help pages: ComfyUI shows js/docs/<NodeId>.md


def test_every_node_has_a_help_page_and_no_page_is_left_over(schemas: dict[str, Any]) -> None:
    assert {page.relative_to(PAGES).as_posix() for page in PAGES.rglob("*.*")} == {f"{n}.md" for n in schemas}


def test_help_pages_name_every_input_and_output(schemas: dict[str, Any]) -> None:
    missing = []
    for name, schema in schemas.items():
        parts = _parts(name)
        wanted = {"Inputs": [shown(entry) for entry in schema.inputs]}
        wanted["Outputs"] = [out.display_name for out in schema.outputs]
        for part, names in wanted.items():
            listed = re.findall(r"^\| `([^`]+)` \|", parts[part], re.MULTILINE)
            if listed != names:
                missing.append((name, part, names, listed))
    assert missing == []


def test_help_pages_have_the_same_sections(schemas: dict[str, Any]) -> None:
    for name, schema in schemas.items():
        title, *sections = re.findall(r"^#+ (.*)$", (PAGES / f"{name}.md").read_text("utf-8"), re.MULTILINE)
        assert title == schema.display_name, name
        assert sections == SECTIONS, name


def test_help_pages_speak_of_nodes_that_exist(schemas: dict[str, Any]) -> None:
    known = {schema.display_name for schema in schemas.values()} | CORE_NODES
    for name in schemas:
        bold = re.findall(r"\*\*(.+?)\*\*", (PAGES / f"{name}.md").read_text("utf-8"))
        assert bold and set(bold) <= known, name


def _parts(name: str) -> dict[str, str]:
    """A page's sections, by title."""
    pieces = re.split(r"^## (.*)$", (PAGES / f"{name}.md").read_text("utf-8"), flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def shown(entry: Any) -> str:
    """The name of an input as the page shows it."""
    return getattr(entry, "display_name", None) or entry.id


# locales: what translators start from, written from the schemas by PIT_RECORD_SCHEMA=1


def test_the_english_texts_are_those_of_the_schemas(schemas: dict[str, Any]) -> None:
    found = {"main": MAIN, "nodeDefs": {name: texts(schema) for name, schema in schemas.items()}}
    if os.environ.get("PIT_RECORD_SCHEMA"):
        ENGLISH.mkdir(parents=True, exist_ok=True)
        for file, content in found.items():
            (ENGLISH / f"{file}.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    for file, content in found.items():
        recorded = json.loads((ENGLISH / f"{file}.json").read_text("utf-8"))
        assert recorded == content, f"{file}.json is outdated; record it with PIT_RECORD_SCHEMA=1"


def test_socket_types_and_categories_have_names(schemas: dict[str, Any]) -> None:
    sockets = {slot.io_type for schema in schemas.values() for slot in [*schema.inputs, *schema.outputs]}
    assert {name for name in sockets if name.startswith("PIT_")} == set(MAIN["dataTypes"])
    assert {schema.category for schema in schemas.values()} == set(MAIN["nodeCategories"])


def test_no_text_means_something_else_to_the_translator(schemas: dict[str, Any]) -> None:
    """ComfyUI's page takes { } @ | for placeholders, links and plurals."""
    said = json.dumps({name: texts(schema) for name, schema in schemas.items()})
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', said)
    assert [text for text in strings if re.search(r"[{}@|]", text)] == []


def test_comfyui_reads_the_english_texts(
    bench: Bench, schemas: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(bench, DoubleBench):
        pytest.skip("asks ComfyUI")
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    (tmp_path / "piece-it-together").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(tmp_path)], set()))
    read = CustomNodeManager().build_translations()["en"]
    assert set(read["nodeDefs"]) == set(schemas)
    assert read["dataTypes"] == MAIN["dataTypes"]


def texts(schema: Any) -> dict[str, Any]:
    """A node's texts as ComfyUI's page looks them up: inputs by name, with '_' for '.', outputs by number."""
    found: dict[str, Any] = {"display_name": schema.display_name, "description": schema.description}
    inputs = {id: text for entry in schema.inputs for id, text in _inputs(entry).items()}
    outputs = {
        str(i): {"name": out.display_name, "tooltip": out.tooltip} for i, out in enumerate(schema.outputs)
    }
    return found | ({"inputs": inputs} if inputs else {}) | ({"outputs": outputs} if outputs else {})


def _inputs(entry: Any) -> dict[str, dict[str, str]]:
    """One input; of a growing one also the slots that it grows, which have a tooltip only if it is here.

    Those get no name: the page looks for tooltips by the translated name, so theirs would be lost.
    """
    found = {entry.id: {"name": shown(entry), "tooltip": entry.tooltip}}
    if template := getattr(entry, "template", None):
        grown = [f"{entry.id}_{template.prefix}{i}" for i in range(template.max)]
        found |= {name: {"tooltip": template.input.tooltip} for name in grown}
    return found


# search


def test_nodes_are_found_by_other_words(bench: Bench, schemas: dict[str, Any]) -> None:
    if not all(hasattr(schema, "search_aliases") for schema in schemas.values()):
        pytest.skip("this ComfyUI knows no other words to search for")
    found = {name: schema.search_aliases for name, schema in schemas.items()}
    for name, words in found.items():
        assert len(set(words)) == len(words) > 2, name
        assert {"piece it together", "pit"} <= set(words), name
    assert "ipadapter" in found["PiTLoadIPAdapter"]
    assert "style transfer" in found["PiTApplyTokens"]
    assert "image prompt" in found["PiTEncodeImage"]


# reports: what nodes tell the page beside their outputs


def told(done: Any) -> dict[str, Any]:
    return done.ui if isinstance(done.ui, dict) else done.ui.as_dict()


def test_the_preview_tells_what_its_picture_does_not(bench: Bench) -> None:
    tokens = bench.tokens(1, rows=3, adapter="0123456789abcdef")
    ui = told(bench.run("PiTPreviewTokens", tokens=tokens))
    lines = ui["text"][0].splitlines()
    lengths = {name: value.norm(dim=-1).mean() for name, value in tokens.tensors().items()}
    assert ui["images"]
    assert lines[0] == "3 rows of 4 tokens, width 32"
    assert lines[1].endswith(f"mean {lengths['tokens']:.3g}")
    assert lines[2:4] == [f"with {name} (length {lengths[name]:.3g})" for name in ("null", "white")]
    assert lines[4:] == ["made with adapter 01234567"]
    bare = told(bench.run("PiTPreviewTokens", tokens=bench.tokens(1, null=None, white=None)))["text"][0]
    assert "neither null nor white" in bare and "unknown adapter" in bare


def test_loaders_tell_what_they_found(bench: Bench) -> None:
    adapter = bench.run("PiTLoadIPAdapter", file=bench.adapter_file())
    assert told(adapter)["text"] == (adapter[1],)
    tokens = bench.tokens(1, adapter=adapter[0].adapter.content_hash)
    preview = told(bench.run("PiTPreviewTokens", tokens=tokens))["text"][0]
    assert re.search(r"adapter \w{8}$", adapter[1])[0] in preview
    prior = bench.run("PiTLoadPrior", file=bench.prior_file())
    assert told(prior)["text"] == (prior[1],)
    saved = told(bench.run("PiTSaveTokens", tokens=tokens))["text"][0]
    loaded = told(bench.run("PiTLoadTokens", file=saved.rpartition(" as ")[2]))["text"]
    assert loaded == (preview,)


# scripts


def node_js() -> str:
    return shutil.which("node") or pytest.skip("needs node, which is not installed")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_javascript(script: Path, tmp_path: Path) -> None:
    module = tmp_path / f"{script.stem}.mjs"  # the name tells node that it has imports
    shutil.copy(script, module)
    done = subprocess.run([node_js(), "--check", module], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_the_app_alone(script: Path) -> None:
    """Everything else that ComfyUI's page has may move."""
    imported = re.findall(r"""(?:from|import)\s*\(?\s*["']([^"']+)["']""", script.read_text("utf-8"))
    assert set(imported) <= {"../../scripts/app.js"}


PAGE = """
globalThis.document = { createElement: () => ({ style: {}, textContent: "" }) };
export const app = { registerExtension: (extension) => { globalThis.extension = extension; } };
app.graph = { nodes: {}, getNodeById: (id) => app.graph.nodes[id] };
"""
TRIAL = """
import { app } from "./scripts/app.js";
import "./extensions/pack/report.js";

function made(name) {
  class Node {
    type = name;
    size = [100, 50];
    widgets = [];
    computeSize() { return [80, 150]; }
    setSize(size) { this.size = size; }
    addDOMWidget(name, type, element, options) {
      const widget = { name, options };
      Object.defineProperty(widget, "value", { get: options.getValue, set: options.setValue });
      this.widgets.push(widget);
      return widget;
    }
  }
  Node.prototype.onExecuted = function () { this.asBefore = true; };
  extension.beforeRegisterNodeDef(Node, { name });
  return new Node();
}

const [ours, other, reopened] = ["PiTPreviewTokens", "PreviewAny", "PiTLoadPrior"].map(made);
for (const node of [ours, other])
  for (const output of [{ images: [] }, undefined, { text: ["first"] }, { text: ["second", "line"] }])
    node.onExecuted(output);
app.graph.nodes = { 1: reopened, 2: other };
const kept = { text: ["kept"] };
extension.onNodeOutputsUpdated({ 1: kept, 2: kept, "gone:3": kept });
const [widget] = ours.widgets;
console.log(JSON.stringify({
  count: [ours, other, reopened].map((node) => node.widgets.length),
  asBefore: [ours.asBefore, other.asBefore],
  text: [widget.value, reopened.widgets[0].value],
  size: ours.size,
  kept: [widget.serialize, widget.options.serialize],
}));
"""


def test_the_newest_report_is_shown_below_our_nodes_and_saved_nowhere(tmp_path: Path) -> None:
    (tmp_path / "extensions/pack").mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "js/report.js", tmp_path / "extensions/pack/report.js")
    (tmp_path / "scripts/app.js").write_text(PAGE, "utf-8")
    (tmp_path / "package.json").write_text('{"type": "module"}', "utf-8")
    (tmp_path / "trial.js").write_text(TRIAL, "utf-8")
    done = subprocess.run([node_js(), tmp_path / "trial.js"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "count": [1, 0, 1],
        "asBefore": [True, True],
        "text": ["second\nline", "kept"],
        "size": [100, 150],
        "kept": [False, False],
    }
