"""Picture files: reading them safely, writing them atomically, and laying them out on a contact sheet."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from .errors import PitError
from .files import existing_file, replacing

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_SIDE = 16_384  # larger than any camera's picture
MAX_PIXELS = 89_000_000  # where Pillow begins to warn of decompression bombs
KEPT_SIDE = 2048  # what is larger is scaled down on reading: no model here sees more than 1024

# What Pillow raises for damaged files, besides OSError.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


# reading


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a PNG, JPEG, WebP, GIF, BMP or TIFF file, of any mode, upright: RGB, or RGBA if it is
    transparent somewhere.

    Any other mode is converted: palettes, greys, 16 bits, CMYK, and colours of an embedded profile to sRGB.
    Above 2048 px the picture is scaled down. The format is told by the content, not by the suffix.

    Raises PitError for a file that is missing, a folder, empty, no picture, damaged or cut short, animated,
    or larger than 16384 px a side or 89 megapixels.
    """
    path = existing_file(path)
    with _opened(path) as image:
        _refuse_size(path, image.size)
        _refuse_frames(path, image)
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except _DAMAGED as error:
            raise PitError(
                f"'{path.name}' is damaged or cut short ({_brief(error)}); save it again."
            ) from error
    plain = to_rgb_or_rgba(upright)
    if max(plain.size) > KEPT_SIDE:
        plain.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
    return plain


def picture_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The picture files directly inside a folder, by suffix, sorted by name; hidden ones are left out."""
    return sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def to_rgb_or_rgba(image: Image.Image) -> Image.Image:
    """Any Pillow mode as RGB, or RGBA where some pixel is transparent; an embedded profile is applied."""
    image = _to_srgb(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_grey(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return rgba if _lowest(rgba.getchannel("A")) < 255 else rgba.convert("RGB")
    return image.convert("RGB")


def _lowest(channel: Image.Image) -> int:
    return int(np.asarray(channel).min())


def _opened(path: Path) -> Image.Image:
    if path.stat().st_size == 0:
        raise PitError(f"'{path.name}' is empty; a picture file was expected.")
    try:
        return Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise PitError(
            f"'{path.name}' is too large: {MAX_PIXELS // 1_000_000} megapixels are the limit; scale it down."
        ) from error
    except _DAMAGED as error:
        raise PitError(
            f"'{path.name}' is not a picture that can be read; PNG, JPEG, WebP, GIF, BMP and TIFF files can."
        ) from error


def _refuse_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise PitError(
            f"'{path.name}' is {width} x {height} px, too large: at most {MAX_SIDE} px a side and "
            f"{MAX_PIXELS // 1_000_000} megapixels are read; scale it down."
        )
    if min(size) < 1:
        raise PitError(f"'{path.name}' is {width} x {height} px and shows nothing.")


def _refuse_frames(path: Path, image: Image.Image) -> None:
    """A phone's MPO holds a preview beside the photograph and is a still picture all the same."""
    try:
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except _DAMAGED as error:
        raise PitError(f"'{path.name}' is damaged or cut short ({_brief(error)}); save it again.") from error
    if frames > 1:
        what = "pages" if image.format == "TIFF" else "frames, it is animated"
        raise PitError(f"'{path.name}' has {frames} {what}; save the one that is meant as a PNG of its own.")


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply an embedded colour profile; one that cannot be used is ignored, as most viewers do."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    target = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        converted = ImageCms.profileToProfile(
            image, source, ImageCms.createProfile("sRGB"), outputMode=target
        )
    except (ImageCms.PyCMSError, *_DAMAGED):
        return image
    return image if converted is None else converted


def _deep_grey(image: Image.Image) -> Image.Image:
    """Deep grey -> 8 bits; whole numbers above 255 count as 16 bits, floats up to 1 as 0 to 1."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    top = values.max(initial=0.0)
    scale = (
        1 / 257
        if image.mode.startswith("I;16") or top > 255
        else 255.0
        if image.mode == "F" and top <= 1
        else 1.0
    )
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:100].rstrip(".")


# writing


def save_png(image: Image.Image, path: str | os.PathLike[str], text: Mapping[str, str] | None = None) -> None:
    """Write a PNG, complete or not at all, with `text` as its text chunks. Raises PitError as files do."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


# the contact sheet

MARGIN, GAP, LABEL, HEADING = 24, 12, 22, 30
INK, PALE, LINE, PAPER = (40, 40, 40), (128, 128, 128), (226, 226, 226), (255, 255, 255)


@dataclass(frozen=True)
class Tile:
    """One picture with the words below it."""

    image: Image.Image
    caption: str = ""


@dataclass(frozen=True)
class SheetRow:
    """What belongs together: the parts, and the concepts made of them."""

    parts: Sequence[Tile]
    concepts: Sequence[Tile]
    title: str = ""


def contact_sheet(
    rows: Sequence[SheetRow], *, cell: int | None = None, columns: int | None = None
) -> Image.Image:
    """All rows on one white sheet, RGB: parts on the left, concepts on the right, captions below each.

    Cells are equal squares of `cell` pixels (by default the largest picture's side, between 192 and 256),
    pictures keep their shape. columns: how many concepts side by side at most; 8 by default, 4 of a single
    row. Raises PitError for a sheet without pictures.
    """
    tiles = [tile for row in rows for tile in (*row.parts, *row.concepts)]
    if not tiles:
        raise PitError("A contact sheet needs at least one picture.")
    cell = cell or min(256, max(192, max(max(tile.image.size) for tile in tiles)))
    parts = min(3, max(len(row.parts) for row in rows))
    columns = columns or (4 if len(rows) == 1 else 8)
    concepts = min(columns, max(len(row.concepts) for row in rows))
    layout = _Layout(cell, parts, concepts)
    sheet = Image.new("RGB", (layout.width, layout.height(rows)), PAPER)
    pen = ImageDraw.Draw(sheet)
    y = MARGIN
    for number, row in enumerate(rows):
        if number:
            pen.line([(MARGIN, y + GAP // 2), (layout.width - MARGIN, y + GAP // 2)], fill=LINE)
            y += 2 * GAP
        if not number or row.title:
            _heading(pen, layout, row, y)
            y += HEADING
        for tiles_of, left, columns in (
            (row.parts, layout.parts_left, parts),
            (row.concepts, layout.concepts_left, concepts),
        ):
            for index, tile in enumerate(tiles_of):
                x = left + index % columns * (cell + GAP)
                _tile(sheet, pen, tile, x, y + index // columns * (cell + LABEL + GAP), cell)
        y += layout.row_height(row)
    return sheet


@dataclass(frozen=True)
class _Layout:
    cell: int
    parts: int  # columns
    concepts: int

    @property
    def parts_left(self) -> int:
        return MARGIN

    @property
    def concepts_left(self) -> int:
        return MARGIN + (self.parts * (self.cell + GAP) + MARGIN if self.parts else 0)

    @property
    def width(self) -> int:
        return self.concepts_left + max(1, self.concepts) * (self.cell + GAP) - GAP + MARGIN

    def row_height(self, row: SheetRow) -> int:
        lines = max(_lines(len(row.parts), self.parts), _lines(len(row.concepts), self.concepts))
        return lines * (self.cell + LABEL + GAP)

    def height(self, rows: Sequence[SheetRow]) -> int:
        headings = HEADING * (1 + sum(bool(row.title) for row in rows[1:]))
        return 2 * MARGIN - GAP + headings + sum(map(self.row_height, rows)) + 2 * GAP * (len(rows) - 1)


def _lines(count: int, columns: int) -> int:
    return -(-count // columns) if columns else 0


def _heading(pen: ImageDraw.ImageDraw, layout: _Layout, row: SheetRow, y: int) -> None:
    font = _font(15)
    if row.parts:
        pen.text((layout.parts_left, y), "parts", fill=INK, font=font)
    if row.concepts:
        pen.text((layout.concepts_left, y), row.title or "concepts", fill=INK, font=font)


def _tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, x: int, y: int, cell: int) -> None:
    picture = _fitted(tile.image, cell)
    sheet.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
    pen.rectangle([x - 1, y - 1, x + cell, y + cell], outline=LINE)
    font = _font(12)
    text = _shortened(_drawable(tile.caption, font), cell, font)
    pen.text((x + cell / 2 - font.getlength(text) / 2, y + cell + 5), text, fill=PALE, font=font)


def _fitted(image: Image.Image, cell: int) -> Image.Image:
    """The picture on white, scaled to the cell; small pictures by whole numbers, so that they stay crisp."""
    rgba = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, (*PAPER, 255)), rgba).convert("RGB")
    scale = cell / max(flat.size)
    size = (max(1, round(flat.width * scale)), max(1, round(flat.height * scale)))
    return flat if size == flat.size else flat.resize(size, Image.Resampling.LANCZOS)


def _shortened(text: str, width: int, font: Any) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + " ...") > width:
        text = text[:-1]
    return text.rstrip() + " ..."


def _drawable(text: str, font: Any) -> str:
    """The small font knows the letters of western Europe and fails on others."""
    small = isinstance(font, ImageFont.ImageFont)
    return text.encode("latin-1", "replace").decode("latin-1") if small else text


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except (TypeError, ImportError):  # Pillow before 10.1, or built without FreeType: one small font
        return ImageFont.load_default()
