"""The miniature's sample pictures, by the numbers that the shipped workflows use."""

from pathlib import Path

import pytest
from benches import Bench
from PIL import Image
from torch import Tensor

KINDS = ["body", "body", "ears", "ears", "eyes", "eyes", "tail", "tail", "wings", "wings"]


@pytest.fixture(scope="module")
def parts(bench: Bench) -> Tensor:
    module = bench.part("nodes.miniature")
    return module.sample_parts(module.PARTS)


def test_the_parts_come_in_the_order_that_is_told(bench: Bench, parts: Tensor) -> None:
    folder = bench.part("nodes.miniature").PARTS
    assert [path.parent.name for path in sorted(folder.glob("*/*.png"))] == KINDS
    assert parts.shape == (10, 256, 256, 3)
    colours = {1: (72, 166, 84), 2: (246, 156, 196), 7: (214, 48, 49), 9: (138, 76, 186)}
    for number, colour in colours.items():
        distance = (parts[number] * 255 - parts.new_tensor(colour)).abs().amax(dim=-1)
        assert (distance < 4).float().mean() > 0.1, number


def test_encoding_sees_of_them_what_it_sees_of_the_files(bench: Bench, parts: Tensor) -> None:
    square, images = bench.part("pit_core.parts.canvas").on_white_square, bench.part("nodes.images")
    files = sorted(bench.part("nodes.miniature").PARTS.glob("*/*.png"))
    for file, sample in zip(files, images.to_pictures(parts, "parts"), strict=True):
        ours, theirs = (images.to_image(square(picture, 128)) for picture in (sample, Image.open(file)))
        assert float((ours - theirs).abs().mean()) < 0.01, file.name


def test_without_the_parts_it_says_so(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(bench.error, match="part pictures are missing"):
        bench.part("nodes.miniature").sample_parts(tmp_path)


def test_the_pictures_are_whole_critters_always_the_same(bench: Bench) -> None:
    module = bench.part("nodes.miniature")
    pictures = module.sample_pictures()
    assert pictures.shape == (4, 256, 256, 3)
    assert pictures.equal(module.sample_pictures())
    white = (pictures.amin(dim=-1) > 0.99).float().mean(dim=(1, 2))
    assert white[0] < 0.1 < 0.4 < float(white[1:].min())  # the first has a scene, the others have none


def test_the_node_hands_them_out(bench: Bench) -> None:
    node = bench.pack.NODE_CLASS_MAPPINGS["PiTMiniatureSDXL"]
    names = [out.display_name for out in node.define_schema().outputs]
    assert names[4:] == ["sample parts", "sample pictures"]
