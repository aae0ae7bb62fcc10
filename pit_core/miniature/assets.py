"""What ships with the miniature beside its models, by name: directions and IP-LoRAs.

Light on purpose: ComfyUI's nodes list these names when they start.
"""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
DIRECTIONS = {
    name: f"directions/{name}.safetensors" for name in ("thin_to_wide", "flat_to_sketch", "plain_to_night")
}
IP_LORAS = {name: f"ip_lora_{name}.safetensors" for name in ("scene", "sheet")}
