"""B4M in ComfyUI: content of one LoRA in the style of another, each on a dial of its own."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io, ui

from ..pit_core.b4m.blocks import PRESETS, parse_blocks
from ..pit_core.b4m.dials import MODES, Dialled, Dials, Source, load_source
from ..pit_core.b4m.factors import lora_of_factors
from ..pit_core.errors import PitError
from ..pit_core.lora.formats import save_lora
from ..pit_core.lora.placing import Placed, Strengths, place_lora
from . import host, miniature
from .sockets import B4MSocket, naming, schema

NO_STYLE = "(none: content_file is one entity)"
CUSTOM = "custom"
AS_IT_IS, HALF = "as it is", "float16"
log = logging.getLogger(__name__)


class PiTLoadB4M(io.ComfyNode):
    """Reads files and compares them; how they are joined and weighed is said where they are applied."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [*miniature.shipped_names(_shipped()), *host.files_in(host.LORAS)]
        return schema(
            "PiTLoadB4M",
            "Load B4M",
            "Reads what was trained as content and as style, two files or one joined entity, in any layout, "
            "and says whether the files were made for each other.",
            ["b4m", "break-for-make", "content style lora", "load lora"],
            inputs=[
                io.Combo.Input(
                    "content_file",
                    options=files,
                    tooltip="The file that was trained on the content; or one entity that holds both. In "
                    "models/loras or output/loras, or one of the miniature's.",
                ),
                io.Combo.Input(
                    "style_file",
                    options=[NO_STYLE, *files],
                    default=NO_STYLE,
                    tooltip="The file that was trained on the style, with the same basis seed and rank. None "
                    "for an entity.",
                ),
            ],
            outputs=[
                B4MSocket.Output(display_name="b4m", tooltip="The files, for 'Apply B4M' and 'Save B4M'."),
                io.String.Output(
                    display_name="report",
                    tooltip="What the files are, and whether their frozen halves agree.",
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, content_file: str | None = None, style_file: str | None = None) -> str:
        return " ".join(_state(name) for name in (content_file, style_file))

    @classmethod
    def execute(cls, content_file: str, style_file: str = NO_STYLE) -> io.NodeOutput:
        with naming("content_file"):
            found = load_source(_path(content_file))
        if style_file != NO_STYLE:
            with naming("style_file"):
                found = Source(found.content, load_source(_path(style_file)).content)
        report = found.report()
        return io.NodeOutput(found, report, ui=ui.PreviewText(report))


class PiTApplyB4M(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTApplyB4M",
            "Apply B4M",
            "Puts content and style on a model, each on a dial of its own: two files spliced into one, or "
            "one entity taken apart.",
            ["b4m", "break-for-make", "content style slider", "b-lora", "ziplora"],
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model, with other LoRAs or IP tokens or without."),
                B4MSocket.Input("b4m", tooltip="What 'Load B4M' has read."),
                _dial(
                    "content",
                    "How much of what it shows; negative numbers lead away. With base 0 and style 0 the "
                    "content does nothing: it acts through those two.",
                ),
                _dial("style", "How much of the look; negative numbers lead away."),
                _dial("base", "How much of the frozen part that content acts through and files share."),
                io.Boolean.Input(
                    "swap_roles",
                    default=False,
                    tooltip="For files that were trained the other way round: content in the up halves, "
                    "style in the down halves.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="For two files. auto: splice them if they were made for each other, else add "
                    "them up and say so. splice: in any case. sum: as two ordinary LoRAs.",
                ),
                io.Combo.Input(
                    "blocks",
                    options=[*PRESETS, CUSTOM],
                    default=next(iter(PRESETS)),
                    tooltip="Where it counts. B-LoRA: content in up_blocks.0.attentions.0 and style in "
                    "up_blocks.0.attentions.1 alone. custom: as block_weights says.",
                ),
                io.String.Input(
                    "block_weights",
                    default="",
                    tooltip="For custom: a block, then content and style, such as 'up_blocks.0: 1 0.5; "
                    "*: 0'; the star is every other block.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The model under the LoRA; the one given stays as it was."
                ),
                B4MSocket.Output(
                    display_name="b4m", tooltip="The LoRA under its dials as one entity, for 'Save B4M'."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How the files were joined, how many layers are patched, and which are not.",
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        b4m: Source,
        content: float = 1.0,
        style: float = 1.0,
        base: float = 1.0,
        swap_roles: bool = False,
        mode: str = "auto",
        blocks: str = "all blocks",
        block_weights: str = "",
    ) -> io.NodeOutput:
        with naming("block_weights"):
            shares = parse_blocks(block_weights if blocks == CUSTOM else blocks)
        dials = Dials(content, style, base, swap_roles, mode, shares)
        with naming("model"):
            keys = host.lora_keys(model)
        with naming("b4m"):
            source = checked(b4m, "b4m")
            dialled = source.dialled(dials)
            placed = _placed(source, dialled, host.shapes_of(model, keys))
        for note in (*dialled.notes, *([placed.warning] if placed.warning else [])):
            log.warning("Apply B4M: %s", note)
        patched = host.add_lora(model, placed, keys, Strengths())
        report = _report(placed, dialled, dials, blocks)
        return io.NodeOutput(patched, Source(source.saved(dialled, dials)), report, ui=ui.PreviewText(report))


class PiTSaveB4M(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTSaveB4M",
            "Save B4M",
            "Writes content and style as one LoRA to output/loras, in the layout that every loader reads.",
            ["save lora", "merge lora", "export b4m"],
            inputs=[
                B4MSocket.Input(
                    "b4m",
                    tooltip="From 'Apply B4M', as it is dialled there; from 'Load B4M', at full strength.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="b4m",
                    tooltip="The name to which a number is added; subfolders with '/'.",
                ),
                io.Combo.Input(
                    "precision",
                    options=[AS_IT_IS, HALF],
                    default=AS_IT_IS,
                    tooltip="As it is keeps every bit; float16 halves a file of 32 bit numbers.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, b4m: Source, filename_prefix: str = "b4m", precision: str = AS_IT_IS) -> io.NodeOutput:
        with naming("b4m"):
            source = checked(b4m, "b4m")
            dialled = source.dialled(Dials())
            lora = source.content if source.style is None else source.saved(dialled, Dials())
        path, name = host.new_file(host.LORAS, filename_prefix)
        save_lora(path, lora, dtype=torch.float16 if precision == HALF else None)
        said = [f"Saved {source} as {name}", *dialled.notes]
        return io.NodeOutput(ui=ui.PreviewText("\n".join(said)))


def checked(value: Any, name: str) -> Source:
    """The value, if it is B4M; else PitError that names the input."""
    if not isinstance(value, Source):
        raise PitError(f"{name} is {type(value).__name__}, not B4M; connect 'Load B4M'.")
    return value


def _dial(name: str, tooltip: str) -> Any:
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=tooltip)


def _placed(source: Source, dialled: Dialled, shapes: Any) -> Placed:
    """Where the layers go under their dials; those that are switched off are no longer among them."""
    whole = place_lora(source.lora(dialled.whole, dialled.method), shapes)
    weighed = lora_of_factors(dialled.factors).layers
    model = {name: weighed[layer.module] for name, layer in whole.model.items() if layer.module in weighed}
    return replace(whole, model=model)


def _report(placed: Placed, dialled: Dialled, dials: Dials, blocks: str) -> str:
    how = {"entity": "one entity", "splice": "spliced", "sum": "added up"}[dialled.method]
    said = f"{how}, content {dials.content:g}, style {dials.style:g}, base {dials.base:g}, {blocks}"
    lines = [placed.report(), said + (", roles swapped" if dials.swap else "")]
    return "\n".join([*lines, *(f"note: {note}" for note in dialled.notes)])


# files


def _shipped() -> dict[str, str]:
    """The miniature's files, by name."""
    found = sorted(miniature.WEIGHTS.glob("b4m_*.safetensors"))
    return {path.stem: path.name for path in found}


def _path(name: str) -> Path:
    return miniature.shipped_or_own(_shipped(), host.LORAS, name)


def _state(name: str | None) -> str:
    return "" if name == NO_STYLE else miniature.state_of_either(_shipped(), host.LORAS, name)
