"""Reading picture files of every kind, refusing what is none, and the contact sheet."""

import struct
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFont

from pit_core.errors import PitError
from pit_core.pictures import (
    MAX_SIDE,
    SheetRow,
    Tile,
    contact_sheet,
    picture_files,
    read_picture,
    save_png,
)

RED = (200, 40, 20)


def _plain(mode: str = "RGB", size: tuple[int, int] = (40, 24)) -> Image.Image:
    return Image.new("RGB", size, RED).convert(mode)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"part.{suffix}"
    _plain().save(path)
    image = read_picture(path)
    assert (image.mode, image.size) == ("RGB", (40, 24))
    assert np.abs(np.asarray(image, int)[12, 20] - RED).max() <= 6


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("L", "png"),
        ("P", "png"),
        ("LA", "png"),
        ("I;16", "png"),
        ("I", "tiff"),
        ("F", "tiff"),
        ("CMYK", "jpg"),
        ("CMYK", "tiff"),
        ("YCbCr", "jpg"),
        ("LAB", "tiff"),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"part.{suffix}"
    _in_mode(mode).save(path)
    image = read_picture(path)
    grey = mode in ("1", "L", "LA", "I;16", "I", "F")
    expected = np.array(_plain().convert("L").convert("RGB") if grey else _plain(), int)[12, 20]
    assert image.mode == "RGB"
    if mode != "1":
        assert np.abs(np.asarray(image, int)[12, 20] - expected).max() <= 8


def _in_mode(mode: str) -> Image.Image:
    grey = np.asarray(_plain().convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "LAB":
        to_lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        return ImageCms.applyTransform(_plain(), to_lab)
    if mode == "P":
        return _plain().quantize(4)
    return _plain().convert(mode)


def test_transparency_is_kept_in_every_form(tmp_path: Path) -> None:
    rgba = _plain("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *RED])
    palette.putpixel((0, 0), 0)
    forms: dict[str, Callable[[Path], None]] = {
        "rgba.png": rgba.save,
        "rgba.webp": rgba.save,
        "la.png": rgba.convert("LA").save,
        "p.png": lambda path: palette.save(path, transparency=0),
        "p.gif": lambda path: palette.save(path, transparency=0),
        "rgb.png": lambda path: _two_colours().save(path, transparency=(0, 0, 0)),
    }
    for name, save in forms.items():
        save(tmp_path / name)
        image = read_picture(tmp_path / name)
        assert image.mode == "RGBA", name
        assert image.getchannel("A").getextrema()[0] < 10, name


def _two_colours() -> Image.Image:
    image = Image.new("RGB", (8, 8), RED)
    image.putpixel((0, 0), (0, 0, 0))
    return image


def test_an_opaque_alpha_channel_is_dropped(tmp_path: Path) -> None:
    _plain("RGBA").save(tmp_path / "part.png")
    assert read_picture(tmp_path / "part.png").mode == "RGB"


def test_the_cameras_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    _plain().save(tmp_path / "photo.jpg", exif=exif)
    assert read_picture(tmp_path / "photo.jpg").size == (24, 40)


def test_an_embedded_profile_is_applied(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    _plain().save(tmp_path / "part.png", icc_profile=profile)
    _plain().save(tmp_path / "broken.png", icc_profile=b"no profile at all")
    for name in ("part.png", "broken.png"):
        assert np.abs(np.asarray(read_picture(tmp_path / name), int)[3, 3] - RED).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 2048), (2000, 3)])
def test_odd_sizes_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    _plain(size=size).save(tmp_path / "part.png")
    assert read_picture(tmp_path / "part.png").size == size


def test_large_pictures_are_scaled_down(tmp_path: Path) -> None:
    _plain("L", (8192, 64)).save(tmp_path / "part.png")
    assert read_picture(tmp_path / "part.png").size == (2048, 16)


def test_a_phones_mpo_is_a_still_picture(tmp_path: Path) -> None:
    _plain().save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[_plain()])
    assert read_picture(tmp_path / "photo.jpg").size == (40, 24)


def _bytes(**options: object) -> bytes:
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!doctype html><html></html>", "not a picture"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "not a picture"),
        (b"hello", "not a picture"),
        (_bytes(format="PNG")[:2000], "damaged or cut short"),
        (_bytes(format="JPEG")[:1200], "damaged or cut short"),
        (_bytes(format="WEBP")[:800], "not a picture|damaged or cut short"),
        (_bytes(format="TIFF")[:6000], "not a picture|damaged or cut short"),
        (_bytes(format="BMP")[:6000], "damaged or cut short"),
    ],
)
def test_what_is_no_whole_picture_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "part.png"
    path.write_bytes(content)
    with pytest.raises(PitError, match=words) as caught:
        read_picture(path)
    assert "\n" not in str(caught.value)
    assert "part.png" in str(caught.value)


def test_a_picture_survives_or_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    for options in ({"format": "PNG"}, {"format": "GIF"}, {"format": "JPEG"}, {"format": "TIFF"}):
        whole = _bytes(**options)
        for cut in range(1, len(whole), max(1, len(whole) // 40)):
            path = tmp_path / "part.png"
            path.write_bytes(whole[:cut])
            try:
                read_picture(path)
            except PitError:
                continue


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    _plain().save(tmp_path / "Wing.png")
    with pytest.raises(PitError, match=r"'Wing\.png' \(upper and lower case differ\)"):
        read_picture(tmp_path / "wing.png")
    with pytest.raises(PitError, match="is a folder"):
        read_picture(tmp_path)


def test_a_picture_20000_px_wide_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (20_000, 4)).save(tmp_path / "wide.png")
    with pytest.raises(PitError, match=rf"20000 x 4 px, too large.*{MAX_SIDE}"):
        read_picture(tmp_path / "wide.png")
    whole = _bytes(format="BMP")
    for name, side in (("large.bmp", 9_500), ("bomb.bmp", 16_000)):
        (tmp_path / name).write_bytes(whole[:18] + struct.pack("<ii", side, side) + whole[26:])
        with pytest.raises(PitError, match="89 megapixels"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_picture(tmp_path / name)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_animations_and_pages_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"part.{suffix}"
    Image.new("RGB", (9, 9), RED).save(path, save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")])
    with pytest.raises(PitError, match="has 2 (frames, it is animated|pages)"):
        read_picture(path)


def test_a_folders_pictures_are_sorted_and_nothing_else(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "c.png").mkdir()
    assert [path.name for path in picture_files(tmp_path)] == ["a.JPG", "b.png"]


def test_a_saved_picture_is_the_same_and_carries_its_text(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    save_png(image, tmp_path / "new" / "a.png", {"pit seed": "7", "parts": "Flügel.png"})
    with Image.open(tmp_path / "new" / "a.png") as read:
        assert read.text == {"pit seed": "7", "parts": "Flügel.png"}
        assert np.array_equal(np.asarray(read), np.asarray(image))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_contact_sheet_shows_every_picture_in_a_cell_of_its_own() -> None:
    colours = [(10 * i, 255 - 10 * i, 128) for i in range(1, 12)]
    tiles = [Tile(Image.new("RGB", (192, 192), colour), f"seed {i}") for i, colour in enumerate(colours)]
    sheet = np.asarray(contact_sheet([SheetRow(tiles[:3], tiles[3:])]))
    for colour in colours:
        rows, columns = np.nonzero((sheet == colour).all(-1))
        # Full squares: no cell covers another.
        assert len(rows) == 192 * 192
        assert (np.ptp(rows), np.ptp(columns)) == (191, 191)


def test_a_contact_sheet_takes_any_shape_size_and_caption() -> None:
    odd = [Image.new("RGBA", (1, 1)), Image.new("L", (3, 900)), Image.new("RGB", (2000, 10))]
    tiles = [Tile(image, "a very long caption that will not fit below its picture " * 3) for image in odd]
    sheet = contact_sheet([SheetRow(tiles, []), SheetRow([], tiles * 5), SheetRow(tiles[:1], tiles[1:])])
    assert sheet.mode == "RGB"
    assert sheet.width < 5000
    with pytest.raises(PitError, match="at least one picture"):
        contact_sheet([SheetRow([], [])])


@pytest.mark.parametrize("error", [TypeError, ImportError])
def test_the_sheet_has_its_words_without_a_font_of_any_size(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Pillow before 10.1 takes no size; one that was built without FreeType has no such font."""

    def load_default(*size: float) -> ImageFont.ImageFont:
        if size:
            raise error
        return ImageFont.load_default_imagefont()

    def sheet(caption: str) -> np.ndarray:
        return np.asarray(contact_sheet([SheetRow([Tile(_plain(), caption)], [])]))

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    assert (sheet("wing") != sheet("")).any()
    assert (sheet("крыло \N{DRAGON} with a name longer than its picture is wide") != sheet("")).any()
