"""IP-LoRA in ComfyUI: a LoRA that makes text heard again beside IP tokens, on model and adapter."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui

from ..pit_core.lora.formats import load_lora
from ..pit_core.lora.placing import Strengths, place_lora
from ..pit_core.miniature.assets import IP_LORAS
from . import host
from .ip_tokens import checked_adapter
from .miniature import shipped_names, shipped_or_own, state_of_either
from .sockets import IPAdapterSocket, naming, schema

FOLDER = "loras"
log = logging.getLogger(__name__)


def _strength(name: str, tooltip: str) -> Any:
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.05, tooltip=tooltip)


class PiTIPLoRA(io.ComfyNode):
    """A LoRA in any layout that is about; every layer is patched or named."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTIPLoRA",
            "Apply IP-LoRA",
            "Puts an IP-LoRA on a model, so that the prompt is heard at full image weight, and on its "
            "IP-Adapter where the file changes that, too. It reads layouts that ComfyUI's own loader skips.",
            ["load lora", "ip-lora", "ipadapter lora", "text adherence", "b4m"],
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model, with IP tokens or LoRAs on it or without."),
                io.Combo.Input(
                    "file",
                    options=[*shipped_names(IP_LORAS), *host.files_in(FOLDER)],
                    tooltip="One of the miniature's, or a file in models/loras: an IP-LoRA, or any other "
                    "LoRA made of pairs of factors.",
                ),
                _strength("strength", "How much all of it counts; 1 is as trained, 0 is off."),
                _strength("input_blocks", "Times the strength: the blocks before the middle one."),
                _strength("middle_block", "Times the strength: the middle block."),
                _strength("output_blocks", "Times the strength: the blocks after the middle one."),
                _strength("adapter_layers", "Times the strength: the IP-Adapter's own layers, if any."),
                IPAdapterSocket.Input(
                    "ip_adapter",
                    optional=True,
                    tooltip="The adapter that the model's tokens go through; for files that change it, too.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model under the LoRA; the one given stays as it was.",
                ),
                IPAdapterSocket.Output(
                    display_name="ip_adapter",
                    tooltip="The adapter under the LoRA, for 'Apply IP Tokens'; as given where the file "
                    "leaves it alone.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What the file is, how many layers are patched, and which are not.",
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_others: Any) -> str:
        return state_of_either(IP_LORAS, FOLDER, file)

    @classmethod
    def execute(
        cls,
        model: Any,
        file: str,
        strength: float = 1.0,
        input_blocks: float = 1.0,
        middle_block: float = 1.0,
        output_blocks: float = 1.0,
        adapter_layers: float = 1.0,
        ip_adapter: host.ManagedAdapter | None = None,
    ) -> io.NodeOutput:
        strengths = Strengths(strength, input_blocks, middle_block, output_blocks, adapter_layers)
        adapter = None if ip_adapter is None else checked_adapter(ip_adapter)
        with naming("model"):
            keys = host.lora_keys(model)
        shapes = host.shapes_of(model, keys)
        with naming("file"):
            lora = load_lora(shipped_or_own(IP_LORAS, FOLDER, file))
            placed = place_lora(lora, shapes, None if adapter is None else adapter.adapter)
        patched = host.add_lora(model, placed, keys, strengths)
        of_adapter = strengths.whole * strengths.adapter
        if adapter is not None and placed.adapter and of_adapter:
            changed = adapter.patched(placed, of_adapter)
            patched, adapter = host.with_adapter(patched, adapter, changed), changed
        if placed.warning:
            log.warning("Apply IP-LoRA: %s", placed.warning)
        report = placed.report()
        return io.NodeOutput(patched, adapter, report, ui=ui.PreviewText(report))
