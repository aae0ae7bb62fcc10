"""The nodes' faces: released ids and inputs never change, so they are compared with a record."""

import json
import os
from pathlib import Path
from typing import Any

from benches import Bench

RECORD = Path(__file__).with_name("schema.json")
IDS = [
    "PiTLoadIPAdapter",
    "PiTEncodeImage",
    "PiTEncodeParts",
    "PiTTokensFromEmbeds",
    "PiTCombineTokens",
    "PiTApplyTokens",
    "PiTPreviewTokens",
    "PiTSaveTokens",
    "PiTLoadTokens",
    "PiTLoadPrior",
    "PiTSamplePrior",
    "PiTFindDirection",
    "PiTEditTokens",
    "PiTSweepDirection",
    "PiTSweepGrid",
    "PiTPreviewDirection",
    "PiTSaveDirection",
    "PiTLoadDirection",
    "PiTIPLoRA",
    "PiTLoadB4M",
    "PiTApplyB4M",
    "PiTSaveB4M",
    "PiTDiptychPrepare",
    "PiTDiptychPrompt",
    "PiTDiptychAttention",
    "PiTDiptychCrop",
    "PiTCutOut",
    "PiTMiniatureSDXL",
    "PiTMiniatureFlux",
]


def schemas(bench: Bench) -> dict[str, Any]:
    return {name: node.define_schema() for name, node in bench.pack.NODE_CLASS_MAPPINGS.items()}


def described(entry: Any) -> dict[str, Any]:
    found = {"id": entry.id, "type": entry.io_type, "optional": bool(entry.optional)}
    for name in ("default", "min", "max", "step", "options"):
        value = getattr(entry, name, None)
        if value is not None and not (name == "options" and entry.id.endswith("file")):
            found[name] = value
    template = getattr(entry, "template", None)
    if template is not None:
        grown = {"prefix": template.prefix, "min": template.min, "max": template.max}
        found["template"] = {**grown, "input": described(template.input)}
    return found


def test_the_nodes_are_as_recorded(bench: Bench) -> None:
    """To record a new node or input: PIT_RECORD_SCHEMA=1."""
    found = {
        name: {
            "inputs": [described(entry) for entry in schema.inputs],
            "outputs": [[out.io_type, out.display_name] for out in schema.outputs],
            "output_node": bool(schema.is_output_node),
        }
        for name, schema in schemas(bench).items()
    }
    if os.environ.get("PIT_RECORD_SCHEMA"):
        RECORD.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    assert found == json.loads(RECORD.read_text("utf-8"))


def test_ids_names_and_categories(bench: Bench) -> None:
    found = schemas(bench)
    assert list(found) == IDS
    assert all(schema.node_id == name for name, schema in found.items())
    assert len({schema.display_name for schema in found.values()}) == len(found)
    assert {schema.category for schema in found.values()} == {"Piece it Together"}


def test_everything_is_explained(bench: Bench) -> None:
    for name, schema in schemas(bench).items():
        assert schema.description.endswith("."), name
        templates = [entry.template.input for entry in schema.inputs if getattr(entry, "template", None)]
        for entry in [*schema.inputs, *templates]:
            assert entry.tooltip and entry.tooltip.endswith("."), (name, entry.id)
        for out in schema.outputs:
            assert out.display_name, name
            assert out.tooltip and out.tooltip.endswith("."), (name, out.display_name)


def test_execute_takes_every_input_with_its_default(bench: Bench) -> None:
    for name, node in bench.pack.NODE_CLASS_MAPPINGS.items():
        code = node.execute.__func__.__code__
        arguments = code.co_varnames[1 : code.co_argcount]
        entries = node.define_schema().inputs
        assert list(arguments) == [entry.id for entry in entries], name
        defaults = node.execute.__func__.__defaults__ or ()
        given = dict(zip(arguments[len(arguments) - len(defaults) :], defaults, strict=True))
        for entry in entries:
            if getattr(entry, "default", None) is not None:
                assert given[entry.id] == entry.default, (name, entry.id)
            if entry.optional:
                assert given[entry.id] is None, (name, entry.id)


def test_the_pack_does_not_take_other_packs_socket_names(bench: Bench) -> None:
    outputs = {out.io_type for schema in schemas(bench).values() for out in schema.outputs}
    ours = {name for name in outputs if name.startswith("PIT_")}
    assert ours == {
        *("PIT_IP_ADAPTER", "PIT_IP_TOKENS", "PIT_IP_PRIOR", "PIT_DIRECTION", "PIT_B4M"),
        "PIT_DIPTYCH_LAYOUT",
    }
    assert not outputs & {"IPADAPTER", "EMBEDS"}


def test_folders_are_added_to_what_is_there(bench: Bench) -> None:
    """Another pack's, or the user's own, entry for the same folder stays and comes first."""
    import folder_paths

    host = bench.host
    before = list(folder_paths.get_folder_paths("ipadapter"))
    paths, suffixes = folder_paths.folder_names_and_paths["ipadapter"]
    folder_paths.folder_names_and_paths["ipadapter"] = (["elsewhere"], {".safetensors"})
    try:
        host.register_folders()
        assert folder_paths.get_folder_paths("ipadapter")[0] == "elsewhere"
        assert folder_paths.get_folder_paths("ipadapter")[1:] == before[-1:]
        assert folder_paths.folder_names_and_paths["ipadapter"][1] == {".safetensors"}
    finally:
        folder_paths.folder_names_and_paths["ipadapter"] = (paths, suffixes)
