"""A LoRA as a picture: how much it changes each block, as bars."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .formats import Source
from .info import GROUPS, BlockNorms, LoraInfo, lora_info

WIDTH, LABELS, NUMBERS, MARGIN = 720, 220, 70, 16
BAR, GAP, HEAD = 9, 10, 60
MAX_BLOCKS = 48  # SDXL has 11 transformers, and about 20 blocks with everything else
PAPER, INK, QUIET = (250, 250, 248), (40, 40, 44), (140, 140, 146)
COLOURS = dict(zip(GROUPS, [(70, 110, 190), (214, 138, 46), (62, 150, 96), (150, 110, 170)], strict=True))


def lora_picture(source: Source | LoraInfo) -> Image.Image:
    """An RGB picture: for each block a bar per group of layers, as long as the norm of its change.

    The first line says what the file is, the number at the right is the block's norm over all groups. Blocks
    beyond the first 48 are counted, not drawn. Raises PitError when the source is not a LoRA.
    """
    info = source if isinstance(source, LoraInfo) else lora_info(source)
    shown = info.blocks[:MAX_BLOCKS]
    groups = [group for group in GROUPS if any(group in block.norms for block in info.blocks)]
    top = max((value for block in shown for value in block.norms.values()), default=0.0)
    row = max(len(groups) * BAR, 14) + GAP
    sheet = Image.new("RGB", (WIDTH, HEAD + len(shown) * row + 2 * MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = _font(12)
    pen.text((MARGIN, MARGIN), str(info), fill=INK, font=font)
    _legend(pen, groups, font)
    for number, block in enumerate(shown):
        _row(pen, block, groups, HEAD + number * row, top, font)
    if len(info.blocks) > len(shown):
        note = f"and {len(info.blocks) - len(shown)} more blocks"
        pen.text((MARGIN, sheet.height - 2 * MARGIN), note, fill=QUIET, font=font)
    return sheet


def _legend(pen: ImageDraw.ImageDraw, groups: list[str], font: Any) -> None:
    x = LABELS
    for group in groups:
        pen.rectangle((x, MARGIN + 24, x + 9, MARGIN + 33), fill=COLOURS[group])
        pen.text((x + 14, MARGIN + 22), group, fill=INK, font=font)
        x += 34 + int(font.getlength(group))


def _row(
    pen: ImageDraw.ImageDraw, block: BlockNorms, groups: list[str], y: int, top: float, font: Any
) -> None:
    label = block.block if len(block.block) <= 30 else block.block[:27] + "..."
    pen.text((MARGIN, y), label, fill=INK, font=font)
    pen.text((WIDTH - NUMBERS + 8, y), f"{block.norm:.3g}", fill=QUIET, font=font)
    for i, group in enumerate(groups):
        length = round((WIDTH - LABELS - NUMBERS) * block.norms.get(group, 0.0) / top) if top else 0
        if length:
            pen.rectangle(
                (LABELS, y + i * BAR, LABELS + length - 1, y + i * BAR + BAR - 3), fill=COLOURS[group]
            )
    pen.line((LABELS - 1, y, LABELS - 1, y + len(groups) * BAR), fill=QUIET)


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow before 10.1, or built without FreeType: one small font
        return ImageFont.load_default()
