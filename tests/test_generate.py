"""Part data out of nothing but a seed: prompts, masks, resuming, and the command from start to end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_finders
import tiny_flux
import tiny_stack
import torch
from blobs import Blobs
from PIL import Image, ImageDraw

from pit_core.cutout import load_detector, load_segmenter
from pit_core.errors import PitError
from pit_core.miniature import generator
from pit_core.miniature.critters import Pose, render
from pit_core.miniature.data import concept_critter
from pit_core.parts.domains import FOLDER, Domain, load_domain, prompts, shipped_domains
from pit_core.parts.generate import JOURNAL, MANIFEST, Generated, Order, Rejected, generate
from pit_core.parts.manifest import read_manifest
from pit_core.parts.masks import Found, MaskFilter, choose_masks, clean, cut_out, fill_holes
from pit_core.parts.painter import (
    DiffusersPainter,
    PaintSettings,
    is_blank,
    load_painter,
    wants_bfloat16,
)
from pit_core.parts.sketch import foreground
from pit_core.parts.sources import DetectedParts, FolderSource, GivenMasks, noise_seed

Run = Callable[..., tuple[int, str, str]]

TOYS = """
templates: ["a {mood} {mood} {animal}", "one {animal}"]
words:
  mood: [calm, proud, shy]
  animal: [fox, owl]
set: "{animal}"
parts: {head: animal head}
"""


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    (tmp_path / "mine.yaml").write_text(TOYS, "utf-8")
    return tmp_path / "mine.yaml"


@pytest.fixture(scope="module")
def finders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector in owl, a segmenter in sam."""
    root = tmp_path_factory.mktemp("finders")
    tiny_finders.save_owlv2(root / "owl")
    tiny_finders.save_sam(root / "sam")
    return root


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux.save(tmp_path_factory.mktemp("flux") / "schnell")


# domains


def test_the_pack_comes_with_the_papers_domains() -> None:
    assert shipped_domains() == ["characters", "products", "toys"]
    characters, products, toys = (load_domain(name) for name in shipped_domains())
    wanted = ("head", "legs", "arms", "wings", "shirt", "pants", "skirt", "hat", "object")
    assert tuple(characters.parts) == wanted
    assert not products.parts
    limits = products.masks
    assert limits.drop_largest and limits.drop_border and (limits.least, limits.most) == (3, 8)
    assert "smiling" in toys.templates[0] and "plush, frontal, wearing" in toys.templates[0]
    for domain in (characters, products, toys):
        assert domain.negative and len(set(prompts(domain, 0, 200))) == 200


def test_a_prompt_is_a_function_of_seed_and_index(toys: Path) -> None:
    domain = load_domain(toys)
    ten = prompts(domain, 7, 10)
    assert ten == prompts(load_domain(toys), 7, 20)[:10]
    assert ten != prompts(domain, 8, 10)
    for index in range(20):
        prompt = domain.prompt(7, index)
        assert prompt.set == prompt.text.split()[-1]  # the animal in the text is the set's
        words = prompt.text.split()
        assert len(set(words)) == len(words)  # {mood} {mood}: two different ones
    assert len({noise_seed(0, index) for index in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not readable YAML"),
        ("- a", "should hold 'name: value' lines, got a list"),
        ("template: [a]\nparts: everything", "unknown name 'template'; did you mean 'templates'?"),
        ("templates: a\nparts: everything", "should have a list of templates"),
        ("templates: []\nparts: everything", "should have a list of templates"),
        ("templates: ['a {mod}']\nwords: {mood: [shy]}\nparts: everything", "did you mean {mood}?"),
        ("templates: ['a {}']\nparts: everything", "the slot {} without a word bank"),
        ("templates: ['a {mood!r}']\nwords: {mood: [shy]}\nparts: everything", "the slot {mood}"),
        ("templates: ['a {mood']\nwords: {mood: [shy]}\nparts: everything", "a bracket too many or too few"),
        ("templates: [a]\nwords: {mood: [shy]}\nparts: everything", "no template with {mood}"),
        ("templates: ['{a b}']\nwords: {a b: [shy]}\nparts: everything", "should be one plain word"),
        (
            "templates: ['{a}']\nwords: {a: [yes]}\nparts: everything",
            "True among 'words.a', which YAML takes",
        ),
        ("templates: ['{a}']\nwords: {a: [x, x]}\nparts: everything", "'x' twice among words.a"),
        ("templates: ['{a}']\nwords: {a: ['{a}']}\nparts: everything", "words hold no slots"),
        ("templates: [a]\nwords: [b]\nparts: everything", "lines as 'words', got a list"),
        ("templates: [a]", "lacks 'parts'"),
        ("templates: [a]\nparts: {Head: head}", "the part 'Head'; take small letters"),
        ("templates: [a]\nparts: {head: a. b}", "without a full stop what to look for as 'head'"),
        ("templates: [a]\nparts: everything\nnegative: [b]", "text as 'negative', got a list"),
        ("templates: [a]\nparts: everything\nset: '{b}'", "the slot {b} without a word bank"),
        ("templates: [a]\nparts: everything\nmasks: {leest: 1}", "did you mean 'least'?"),
        ("templates: [a]\nparts: everything\nmasks: {least: 0}", "a whole number from 1, got 0"),
        ("templates: [a]\nparts: everything\nmasks: {min_area: 30}", "a share from 0 to 1, got 30"),
        ("templates: [a]\nparts: everything\nmasks: {fill: 1}", "fill to be true or false, got 1"),
        ("templates: [a]\nparts: everything\nmasks: {min_area: 0.5}", "min_area up to max_area"),
    ],
)
def test_a_broken_domain_is_told_in_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    with pytest.raises(PitError) as caught:
        load_domain(tmp_path / "mine.yaml")
    sentence = str(caught.value)
    assert said in sentence and sentence.startswith("'mine.yaml' ") and "\n" not in sentence


def test_an_unknown_domain_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(PitError, match="no domain 'character'; it is characters, products, toys, or a YAML"):
        load_domain("character")
    with pytest.raises(PitError, match="There is no file"):
        load_domain(tmp_path / "absent.yaml")


# masks


def box_mask(left: int, top: int, right: int, bottom: int, size: int = 100) -> np.ndarray:
    mask = np.zeros((size, size), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def chosen(masks: Sequence[np.ndarray], **settings: Any) -> list[int]:
    """The numbers of the masks that are kept, in their order."""
    found = [Found(str(number), mask) for number, mask in enumerate(masks)]
    return [int(each.kind) for each in choose_masks(found, MaskFilter(**settings))]


def test_parts_cover_one_and_a_half_to_thirty_percent() -> None:
    small, least = box_mask(40, 40, 54, 50), box_mask(40, 40, 55, 50)  # 1.4 and 1.5 %
    most, large = box_mask(10, 10, 70, 60), box_mask(10, 10, 70, 61)  # 30 and 30.6 %
    assert chosen([small]) == [] == chosen([large])
    assert chosen([least]) == [0] == chosen([most])


def test_the_smallest_come_first_and_overlaps_are_skipped() -> None:
    large, small, apart = box_mask(10, 10, 50, 50), box_mask(20, 20, 40, 40), box_mask(60, 60, 90, 90)
    assert chosen([large, small, apart]) == [1, 2]
    assert chosen([large, small, apart], overlap=1.0) == [1, 2, 0]
    many = [box_mask(10 * i, 0, 10 * i + 10, 20 + i) for i in range(10)]
    assert chosen(many) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_products_lose_the_largest_mask_and_those_at_the_border() -> None:
    background, edge = box_mask(5, 5, 95, 95), box_mask(0, 40, 20, 60)
    inside = [box_mask(30, 30, 50, 50), box_mask(60, 60, 80, 80)]
    masks = load_domain("products").masks
    found = [Found("part", mask) for mask in (background, edge, *inside)]
    assert [each.mask.sum() for each in choose_masks(found, masks)] == [400, 400]


def test_gaps_are_closed_specks_opened_and_holes_filled() -> None:
    mask = box_mask(200, 200, 600, 600, 1024)
    mask[300:305, 200:600] = False  # a gap of 5 px
    mask[350:450, 350:450] = False  # a hole
    mask[800:810, 800:810] = True  # a speck of 10 px
    cleaned = clean(mask, MaskFilter())
    assert cleaned[302, 400] and cleaned[400, 400] and not cleaned[805, 805]
    assert cleaned.sum() == 400 * 400
    assert not clean(mask, MaskFilter(fill=False))[400, 400]
    assert not clean(mask, MaskFilter(kernel=3))[302, 210]


def test_holes_are_what_cannot_be_reached_from_outside() -> None:
    ring = Image.new("L", (40, 30))
    ImageDraw.Draw(ring).ellipse([5, 5, 30, 25], outline=255, width=2)
    mask = np.asarray(ring) > 0
    filled = fill_holes(mask)
    assert filled[15, 17] and not filled[0, 0] and not filled[5, 5]
    mask = mask.copy()
    mask[15, :10] = False  # a way in
    assert np.array_equal(fill_holes(mask), mask)
    assert fill_holes(np.ones((3, 3), dtype=bool)).all()


def test_a_part_is_cut_tightly_on_white() -> None:
    image = Image.new("RGB", (100, 100), (10, 20, 30))
    mask = box_mask(20, 30, 40, 60)
    mask[30, 20] = False
    piece = cut_out(image, Found("head", mask))
    assert (piece.kind, piece.box, piece.image.size) == ("head", (20, 30, 40, 60), (20, 30))
    assert piece.image.getpixel((0, 0)) == (255, 255, 255)
    assert piece.image.getpixel((1, 0)) == (10, 20, 30)
    with pytest.raises(PitError, match="The part 'head' cannot be cut out: The mask is 100 x 100 px"):
        cut_out(image.resize((50, 50)), Found("head", mask))


# generating


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def made(source: Any, count: int, out: Path) -> Generated:
    return generate(source, count, out, quiet=True)


def test_a_manifest_says_what_was_made(tmp_path: Path) -> None:
    done = made(Blobs(), 6, tmp_path)
    assert (done.wholes, done.parts, done.rejected, done.drawn) == (5, 7, 1, 6)
    wholes = read_manifest(tmp_path / MANIFEST)
    assert [whole.target for whole in wholes] == [f"000/00000{i}.png" for i in (0, 1, 2, 4, 5)]
    assert wholes[1].parts == ("000/000001_0.png", "000/000001_1.png")
    assert wholes[1].set == "blobs" and wholes[1].provenance["kinds"] == ["blob", "blob"]
    left, top, right, bottom = wholes[1].boxes[0] or (0, 0, 0, 0)
    with Image.open(tmp_path / wholes[1].parts[0]) as part:
        assert part.size == (right - left, bottom - top)
    assert (tmp_path / "contact-sheet.png").is_file()
    assert '"rejected": "too few parts"' in (tmp_path / JOURNAL).read_text()


def test_a_stopped_run_goes_on_and_the_files_are_those_of_one_run(tmp_path: Path) -> None:
    made(Blobs(), 9, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        made(Blobs(stop_at=6), 9, tmp_path / "cut")
    assert [whole.provenance["prompt"] for whole in read_manifest(tmp_path / "cut" / MANIFEST)] == [
        f"blob {i}" for i in (0, 1, 2, 4, 5)
    ]
    again = Blobs()
    made(again, 9, tmp_path / "cut")
    assert again.drawn == [6, 7, 8, 9]  # nothing twice; batches are drawn whole
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    idle = Blobs()
    assert made(idle, 9, tmp_path / "cut").drawn == 0 and idle.drawn == []


def test_fewer_pictures_first_and_more_later_are_the_same_files(tmp_path: Path) -> None:
    made(Blobs(), 3, tmp_path / "grown")
    made(Blobs(), 8, tmp_path / "grown")
    made(Blobs(), 8, tmp_path / "whole")
    assert tree(tmp_path / "grown") == tree(tmp_path / "whole")


def test_a_line_torn_by_a_power_cut_is_made_again(tmp_path: Path) -> None:
    made(Blobs(), 4, tmp_path)
    before = tree(tmp_path)
    journal = tmp_path / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    made(Blobs(), 4, tmp_path)
    assert tree(tmp_path) == before
    journal.write_text(journal.read_text().replace('"index": 1', '"index": x'))
    with pytest.raises(PitError, match="Line 2 of .* is damaged"):
        made(Blobs(), 4, tmp_path)


def test_a_killed_process_goes_on_where_it_was(tmp_path: Path, root: Path) -> None:
    folders = [str(root), str(root / "tests" / "support")]
    script = f"""
import sys
sys.path[:0] = {folders!r}
from blobs import Blobs
from pit_core.parts.generate import generate
generate(Blobs(slow=0.02), 500, {str(tmp_path / "cut")!r}, quiet=True)
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    journal = tmp_path / "cut" / JOURNAL
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and (not journal.exists() or journal.read_bytes().count(b"\n") < 3):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    child.wait()
    told = journal.read_bytes().count(b"\n")
    assert 3 <= told < 500
    again = Blobs()
    made(again, told + 2, tmp_path / "cut")
    assert all(index >= told - told % 2 for index in again.drawn)  # batches are drawn whole
    made(Blobs(), told + 2, tmp_path / "whole")
    cut, whole = tree(tmp_path / "cut"), tree(tmp_path / "whole")
    assert {name: cut[name] for name in whole} == whole  # the killed run may have drawn a picture more


def test_other_settings_and_other_folders_are_refused(tmp_path: Path) -> None:
    made(Blobs(), 2, tmp_path / "a")
    before = tree(tmp_path / "a")
    with pytest.raises(PitError, match="was begun with seed 0, not 1; give the same as before"):
        made(Blobs(seed=1), 4, tmp_path / "a")
    with pytest.raises(PitError, match="was begun with batch 2, not 3"):
        made(Blobs(batch=3), 4, tmp_path / "a")
    assert tree(tmp_path / "a") == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / MANIFEST).write_text("{}")
    with pytest.raises(PitError, match="already holds part data of another origin"):
        made(Blobs(), 2, tmp_path / "b")
    with pytest.raises(PitError, match="at least 1 picture"):
        made(Blobs(), 0, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_run_without_a_usable_picture_says_why(tmp_path: Path) -> None:
    class Hopeless(Blobs):
        def find(self, image: Image.Image, order: Order) -> Rejected:
            return Rejected("0 of at least 1 parts found.")

    with pytest.raises(PitError, match="None of the 2 pictures can be used; the first: 0 of at least 1"):
        made(Hopeless(), 2, tmp_path)


# what finds parts


def test_given_masks_may_come_after_the_pictures(tmp_path: Path, toys: Path) -> None:
    for folder in ("pictures", "masks"):
        (tmp_path / folder).mkdir()
    for name in ("fox.png", "fox_red.png"):
        Image.new("RGB", (20, 16), (90, 30, 30)).save(tmp_path / "pictures" / name)

    def run() -> Generated:
        domain = load_domain(toys)
        finder = GivenMasks(tmp_path / "masks", domain)
        source = FolderSource(tmp_path / "pictures", domain, finder)
        return made(source, source.count, tmp_path / "out")

    first = run()
    assert (first.wholes, first.waiting, first.drawn) == (0, 2, 2)
    mask = Image.new("L", (20, 16))
    mask.paste(255, (3, 4, 9, 12))
    mask.save(tmp_path / "masks" / "fox_red_head.png")
    second = run()
    assert (second.wholes, second.waiting, second.drawn) == (1, 1, 0)
    (whole,) = read_manifest(tmp_path / "out" / MANIFEST)
    assert whole.boxes == ((3, 4, 9, 12),) and whole.provenance["kinds"] == ["head"]
    assert whole.provenance["prompt"] == "fox_red.png"
    mask.resize((5, 5)).save(tmp_path / "masks" / "fox_head_2.png")
    with pytest.raises(PitError, match="make masks of the picture's size"):
        run()


def test_parts_are_detected_segmented_and_filtered(finders: Path, toys: Path) -> None:
    domain = load_domain(toys)
    loose = replace(domain, masks=MaskFilter(min_area=0, max_area=1, kernel=1, overlap=1, most=2))
    order, image = Order(0, "a fox", 0, "fox", "000000"), Image.new("RGB", (32, 32), (80, 120, 60))
    ImageDraw.Draw(image).ellipse([8, 4, 22, 28], fill=(200, 60, 40))
    segmenter = load_segmenter(finders / "sam")
    find = DetectedParts(loose, load_detector(finders / "owl"), segmenter, threshold=1e-9)
    found = find(image, order)
    assert not isinstance(found, Rejected) and 1 <= len(found) <= 2
    assert all(piece.kind == "head" and piece.box is not None for piece in found)
    strict = DetectedParts(replace(loose, masks=MaskFilter(least=8)), find.detector, segmenter)
    said = strict(image, order)
    assert isinstance(said, Rejected) and "of at least 8 parts found" in said.reason
    with pytest.raises(PitError, match="found by their names; add --detector"):
        DetectedParts(domain, None, segmenter)


# what draws


@pytest.mark.parametrize(("kind", "settings"), [("schnell", (4, 0.0)), ("dev", (28, 3.5))])
def test_flux_is_drawn_with_its_own_settings(
    schnell: Path, tmp_path: Path, kind: str, settings: tuple[int, float]
) -> None:
    folder = schnell if kind == "schnell" else tiny_flux.save(tmp_path / kind, schnell=False)
    usual = load_painter(folder, size=32)
    assert (usual.settings.steps, usual.settings.guidance, usual.settings.size) == (*settings, 32)
    paint = DiffusersPainter(usual.pipe, replace(usual.settings, steps=2))
    orders = [Order(i, f"one fox {i}", noise_seed(0, i), "fox", f"{i:06d}") for i in range(2)]
    first, second = paint(orders)
    assert first.size == (32, 32) and first.tobytes() != second.tobytes()
    assert load_painter(folder, steps=2, size=32)(orders)[1].tobytes() == second.tobytes()
    assert wants_bfloat16(folder)


def test_a_painter_refuses_what_it_cannot_draw(schnell: Path, tmp_path: Path) -> None:
    pipe = load_painter(schnell, size=16).pipe
    with pytest.raises(PitError, match="a picture size in multiples of 8 px, got 20"):
        DiffusersPainter(pipe, PaintSettings(4, 0.0, 20))
    with pytest.raises(PitError, match="steps from 1 to 1000, got 0"):
        PaintSettings(0, 0.0, 16)
    folder = tmp_path / "flux"
    shutil.copytree(schnell, folder, ignore=shutil.ignore_patterns("text_encoder_2"))
    with pytest.raises(PitError, match="lacks the folder text_encoder_2, which holds its T5EncoderModel"):
        load_painter(folder)


def test_pictures_of_one_colour_are_left_out_unless_the_model_makes_no_others(schnell: Path) -> None:
    paint = load_painter(schnell, steps=1, size=32)
    orders = [Order(i, "a fox", i, "fox", f"{i:06d}") for i in range(8)]
    assert not any(is_blank(image) for image in paint(orders[:1]) if isinstance(image, Image.Image))
    broken = DiffusersPainter(paint.pipe, paint.settings)
    broken.pipe.vae.decoder.conv_out.weight.data.fill_(float("nan"))
    assert [type(each) for each in broken(orders[:3])] == [Rejected] * 3
    with pytest.raises(PitError, match="first 8 pictures all came out in one colour: the model's files may"):
        broken(orders[3:])
    assert [type(each) for each in paint(orders)] == [Rejected] * 8  # it has drawn others before
    broken.pipe.to(torch.float16)
    with pytest.raises(
        PitError, match="overflow in float16, so begin again with --dtype bfloat16 and another"
    ):
        broken(orders[:1])


def test_two_pictures_of_one_name_are_refused(tmp_path: Path, toys: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("owl.png", "fox.png", "fox.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    domain = load_domain(toys)
    with pytest.raises(PitError, match="two pictures called 'fox'"):
        FolderSource(tmp_path / "pictures", domain, GivenMasks(tmp_path, domain))


# the miniature


def test_critters_parts_are_found_where_the_world_drew_them() -> None:
    world = (concept_critter(1, index) for index in range(100))
    posed = next(each for each in world if each.tail and each.wings and each.ears)
    critter = replace(posed, pose=Pose(4.0, -4.0, 0.94, mirror=True))
    shown = foreground(render(critter))
    pose, fit = generator.fitted_pose(posed, shown)
    assert (pose, fit > 0.9) == (critter.pose, True)
    labels = generator.label_map(critter)
    for found in generator.part_masks(critter, shown):
        place = labels == generator.BACK_TO_FRONT.index(found.kind) + 1
        assert (found.mask & place).sum() > 0.5 * found.mask.sum(), found.kind
    without_tail = foreground(render(replace(critter, tail=None)))
    kinds = {found.kind for found in generator.part_masks(critter, without_tail)}
    assert kinds == {"body", "eyes", "ears", "wings"}


# the command


def test_from_the_miniatures_pictures_to_tokens(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    code, text, errors = run("data", "generate", "critters", "--count", 3, "--batch", 3, "--out", data)
    assert code == 0, errors
    assert "3 pictures drawn now" in text
    wholes = read_manifest(data / MANIFEST)
    assert len(wholes) >= 2 and all({"body", "eyes"} <= set(w.provenance["kinds"]) for w in wholes)
    assert run("data", "show", data / MANIFEST, "--out", tmp_path / "sheet.png")[0] == 0
    embed = ("data", "embed", data / MANIFEST, "--out", tmp_path / "tokens", "--views", 1)
    code, text, errors = run(*embed)
    assert code == 0 and f"{len(wholes)} wholes in 1 shards, 1 of them encoded now" in text, errors


def test_critters_are_drawn_by_the_world_when_asked(run: Run, tmp_path: Path) -> None:
    code, text, _ = run("data", "generate", "critters", "--drawn", "--count", 3, "--out", tmp_path / "data")
    assert code == 0 and "3 wholes with" in text
    for whole in read_manifest(tmp_path / "data" / MANIFEST):
        assert len(whole.parts) == len(whole.provenance["kinds"]) >= 2
        with Image.open(tmp_path / "data" / whole.target) as image:
            assert image.size == (128, 128)


def test_a_domain_with_models_of_ones_own(run: Run, toys: Path, finders: Path, tmp_path: Path) -> None:
    text = toys.read_text() + "masks: {min_area: 0, max_area: 1, kernel: 1, overlap: 1}\n"
    toys.write_text(text)
    sdxl = tiny_stack.save(tmp_path / "models").sdxl
    models = ("--model", sdxl, "--detector", finders / "owl", "--segmenter", finders / "sam")
    settings = ("--steps", 2, "--threshold", 1e-9, "--device", "cpu", "--count", 2)
    code, text, errors = run("data", "generate", toys, *models, *settings, "--out", tmp_path / "data")
    assert code == 0 and "2 wholes with" in text, errors
    begun = json.loads((tmp_path / "data" / "generate.json").read_text())
    assert begun["model"] | {"sha256": ""} == {
        "sha256": "",
        "dtype": "float32",
        "steps": 2,
        "guidance": 5.0,
        "size": 32,
    }
    first = read_manifest(tmp_path / "data" / MANIFEST)[0]
    assert first.set == load_domain(toys).prompt(0, 0).set
    code, _, errors = run(
        "data", "generate", toys, *models, *settings, "--seed", 1, "--out", tmp_path / "data"
    )
    assert code == 2 and "was begun with seed 0, not 1" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing",), "There is no domain 'nothing'"),
        (("toys",), "need --model (FLUX.1 or SDXL) or --pictures"),
        (("toys", "--drawn"), "--drawn is for critters"),
        (("critters", "--model", "x"), "--model has no use here: critters come from the miniature alone"),
        (("critters", "--steps", "3"), "--steps has no use here"),
        (("toys", "--model", "x"), "found by --detector and --segmenter; or give --masks"),
        (("products", "--model", "x"), "The parts of 'products' are found by --segmenter; or"),
        (("toys", "--model", "x", "--masks", "{folder}/absent"), "There is no folder"),
        (("toys", "--model", "{folder}/absent", "--masks", "{folder}"), "There is no file"),
        (("toys", "--model", "{folder}", "--masks", "{folder}"), "is no diffusers folder"),
        (("toys", "--pictures", "{folder}", "--masks", "{folder}"), "holds no pictures"),
        (
            ("toys", "--pictures", "{folder}", "--masks", "{folder}", "--detector", "x"),
            "--detector has no use",
        ),
        (("toys", "--pictures", "{folder}", "--masks", "{folder}", "--size", "8"), "--size has no use"),
        (("products", "--model", "x", "--segmenter", "x", "--threshold", "0.3"), "--threshold has no use"),
        (("toys", "--model", "x", "--segmenter", "{folder}", "--detector", "{folder}"), "has no config.json"),
    ],
)
def test_mistakes_end_in_a_sentence(run: Run, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    filled = [argument.format(folder=tmp_path) for argument in arguments]
    code, _, errors = run("data", "generate", *filled, "--out", tmp_path / "data")
    assert code == 2 and said in errors, errors
    assert "Traceback" not in errors and not (tmp_path / "data").exists()


def test_the_domains_are_package_data(root: Path) -> None:
    assert {path.suffix for path in FOLDER.iterdir()} == {".yaml"}
    assert '"**/*.yaml"' in (root / "pyproject.toml").read_text("utf-8")
    assert isinstance(load_domain("toys"), Domain)
