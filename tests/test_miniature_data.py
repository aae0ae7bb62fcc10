"""Picture sets on disk, what is cached of them, and the training batches made of both."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pit_core.errors import PitError
from pit_core.miniature import data, models
from pit_core.miniature.batches import (
    NEUTRAL,
    TIME_IDS,
    Captioned,
    Captioner,
    Concepts,
    Conditioned,
    Pictures,
    to_pixels,
)
from pit_core.miniature.cache import cached
from pit_core.miniature.critters import COLOUR_NAMES, KINDS, SHAPES, is_held_out
from pit_core.miniature.data import ABSENT, LABELS, NO_COLOUR, VIEWS, PictureSet, draw_set
from pit_core.miniature.tokenizer import WordTokenizer

SEED = 5


def _world(index: int) -> list[data.Picture]:
    return [data.world_picture(SEED, index)]


def _concept(index: int) -> list[data.Picture]:
    return data.concept_pictures(SEED, index)


def _drawn_world(index: int) -> list[data.Drawn]:
    return [picture.drawn() for picture in _world(index)]


def _drawn_concept(index: int) -> list[data.Drawn]:
    return [picture.drawn() for picture in _concept(index)]


def _numbered(index: int, log: Path, fails_at: int = -1) -> list[data.Drawn]:
    """Index + 1 grey pictures of grey level `index`; notes that it was asked, and may break off."""
    if index == fails_at:
        raise KeyboardInterrupt
    with log.open("a") as file:
        file.write(f"{index}\n")
    picture = np.full((128, 128, 3), index, np.uint8)
    return [(picture, np.full(LABELS, index, np.int64))] * (index + 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    return draw_set(tmp_path_factory.mktemp("sets"), "world", _drawn_world, 12, workers=1, quiet=True)


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> PictureSet:
    return draw_set(tmp_path_factory.mktemp("sets"), "concepts", _drawn_concept, 6, workers=1, quiet=True)


# what pictures there are


def test_pictures_are_named_by_seed_and_index() -> None:
    for index in range(10):
        assert data.world_picture(SEED, index) == data.world_picture(SEED, index)
        assert data.concept_pictures(SEED, index) == data.concept_pictures(SEED, index)
    assert data.world_picture(SEED, 0) != data.world_picture(SEED + 1, 0)


def test_training_pictures_are_never_held_out_and_check_pictures_always() -> None:
    for index in range(40):
        assert not is_held_out(data.world_picture(SEED, index).critter)
        assert is_held_out(data.world_picture(SEED, index, held_out=True).critter)
        assert not is_held_out(data.concept_critter(SEED, index))
        assert is_held_out(data.concept_critter(SEED, index, held_out=True))


def test_a_concept_comes_whole_then_in_its_parts() -> None:
    whole, *parts = data.concept_pictures(SEED, 1)
    assert whole.view == "whole"
    assert [part.view for part in parts] == list(whole.critter.parts())
    assert {part.critter.scene for part in parts} == {"plain"}
    for part in parts:
        assert part.critter.parts() == whole.critter.parts()


def test_labels_say_what_is_seen() -> None:
    for index in range(20):
        critter = data.concept_critter(SEED, index)
        whole = data.labels_of(critter)
        for slot, kind in enumerate(KINDS):
            part = critter.part(kind)
            state, colour = whole[slot], whole[len(KINDS) + slot]
            if part is None:
                assert (state, colour) == (ABSENT, NO_COLOUR)
                continue
            assert SHAPES[kind][state] == part.shape and COLOUR_NAMES[colour] == part.colour
            alone = data.labels_of(critter, kind)
            assert alone[slot] == state and alone[len(KINDS) + slot] == colour
            assert (np.delete(alone[: len(KINDS)], slot) == ABSENT).all()
            assert VIEWS[alone[-1]] == kind
        assert VIEWS[whole[-1]] == "whole" and whole[-2] == round(1000 * critter.build)


def test_captions_of_pictures_follow_their_view() -> None:
    whole, part, *_ = data.concept_pictures(SEED, 2)
    assert "critter" in whole.caption()
    assert part.caption().startswith("only ")


# sets on disk


def test_a_set_is_drawn_once_and_keeps_its_order(tmp_path: Path) -> None:
    log = tmp_path / "log"
    make = partial(_numbered, log=log)
    first = draw_set(tmp_path, "set", make, 5, chunk=2, workers=1, quiet=True)
    assert len(first) == 15 and first.pixels.dtype == np.uint8
    expected = np.repeat(np.arange(5), np.arange(5) + 1)
    assert (first.groups == expected).all() and (first.labels[:, 0] == expected).all()
    assert (first.pixels[:, 0, 0, 0] == expected).all()
    assert not list((tmp_path / "set").glob("chunk-*"))
    again = draw_set(tmp_path, "set", make, 5, chunk=2, workers=1, quiet=True)
    assert (again.pixels == first.pixels).all()
    assert log.read_text().split() == list("01234")


def test_after_an_interruption_only_missing_chunks_are_drawn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        draw_set(tmp_path, "set", partial(_numbered, log=log, fails_at=3), 6, chunk=2, workers=1, quiet=True)
    assert log.read_text().split() == ["0", "1", "2"]
    chunks = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert chunks == ["chunk-00000.npz"]
    log.unlink()
    done = draw_set(tmp_path, "set", partial(_numbered, log=log), 6, chunk=2, workers=1, quiet=True)
    assert log.read_text().split() == ["2", "3", "4", "5"]
    assert (done.groups == np.repeat(np.arange(6), np.arange(6) + 1)).all()


def test_many_processes_draw_the_same_set(tmp_path: Path, world: PictureSet) -> None:
    shared = draw_set(tmp_path, "world", _drawn_world, 12, chunk=5, workers=2, quiet=True)
    assert (shared.pixels == world.pixels).all() and (shared.labels == world.labels).all()


def test_a_set_of_another_size_is_refused(tmp_path: Path) -> None:
    make = partial(_numbered, log=tmp_path / "log")
    draw_set(tmp_path, "set", make, 2, workers=1, quiet=True)
    with pytest.raises(PitError, match="holds 2 groups of pictures, but 3 were asked for"):
        draw_set(tmp_path, "set", make, 3, workers=1, quiet=True)


def test_drawn_pixels_and_labels_are_those_of_the_pictures(concepts: PictureSet) -> None:
    row = 0
    for index in range(6):
        for picture in _concept(index):
            assert (concepts.pixels[row] == picture.draw()).all()
            assert (concepts.labels[row] == data.labels_of(picture.critter, picture.view)).all()
            assert concepts.groups[row] == index
            row += 1
    assert row == len(concepts)


# batches


def test_pixels_are_channels_first_between_minus_one_and_one() -> None:
    images = np.zeros((2, 4, 5, 3), np.uint8)
    images[0, 1, 2] = (255, 0, 51)
    pixels = to_pixels(images)
    assert pixels.shape == (2, 3, 4, 5) and pixels.dtype == torch.float32
    assert torch.allclose(pixels[0, :, 1, 2], torch.tensor([1.0, -1.0, -0.6]))


def test_pictures_are_counted_over_all_sets_or_over_chosen_rows(
    world: PictureSet, concepts: PictureSet
) -> None:
    both = Pictures([world, concepts])
    assert len(both) == len(world) + len(concepts)
    assert both.place(3) == (world, 3) and both.place(len(world) + 4) == (concepts, 4)
    chosen = Pictures([world, concepts], rows=np.array([len(world), 2]))
    assert len(chosen) == 2 and chosen.place(0) == (concepts, 0)
    batch = chosen.fetch([(0, 1), (7, 0)])
    assert (batch["pixels"] == to_pixels(np.stack([world.pixels[2], concepts.pixels[0]]))).all()
    assert batch["labels"].tolist() == [world.labels[2].tolist(), concepts.labels[0].tolist()]


def test_crops_depend_on_epoch_and_index_alone(world: PictureSet) -> None:
    crops = Pictures([world], crop=48)
    one = crops.fetch([(0, 3), (1, 3), (0, 4)])["pixels"]
    again = crops.fetch([(0, 4), (0, 3)])["pixels"]
    assert one.shape == (3, 3, 48, 48)
    assert (one[0] == again[1]).all() and (one[2] == again[0]).all()
    assert (one[0] != one[1]).any()


def test_crops_are_livelier_than_chance(concepts: PictureSet) -> None:
    crops = Pictures([concepts], crop=48).fetch([(0, index) for index in range(len(concepts))])["pixels"]
    corners = torch.from_numpy(np.random.default_rng(0).integers(0, 81, (len(concepts), 2)))
    whole = to_pixels(concepts.pixels[:])
    chance = torch.stack([p[:, y : y + 48, x : x + 48] for p, (y, x) in zip(whole, corners, strict=True)])
    assert crops.flatten(1).std(1).mean() > 1.05 * chance.flatten(1).std(1).mean()


def test_moved_pictures_are_the_same_a_few_pixels_away_or_mirrored(world: PictureSet) -> None:
    moved = Pictures([world], moved=True)
    picture = to_pixels(world.pixels[3:4])[0]
    middle = picture[:, 5:-5, 5:-5]
    mirrored = set()
    for epoch in range(12):
        batch = moved.fetch([(epoch, 3)])
        assert (batch["pixels"] == moved.fetch([(epoch, 3)])["pixels"]).all()
        assert (batch["labels"] == torch.from_numpy(world.labels[3])).all()
        windows = batch["pixels"][0].unfold(1, 118, 1).unfold(2, 118, 1)  # (3, 11, 11, 118, 118)
        found = [
            bool((windows == shown[:, None, None]).all(dim=(0, 3, 4)).any())
            for shown in (middle, middle.flip(-1))
        ]
        assert any(found)
        mirrored.add(found[1] and not found[0])
    assert mirrored == {False, True}


def test_captions_belong_to_their_pictures_and_vary_with_the_epoch(
    world: PictureSet, concepts: PictureSet
) -> None:
    captioner = Captioner({world.folder: _world, concepts.folder: _concept})
    for row in range(len(concepts)):
        text = captioner(concepts, row, (0, row))
        view, states = VIEWS[concepts.labels[row, -1]], concepts.labels[row, : len(KINDS)]
        if view == "whole":
            assert "critter" in text
        else:
            shape = SHAPES[view][states[KINDS.index(view)]]
            assert text.startswith("only") and f"{shape} {view}" in text
    assert captioner(world, 0, (4, 0)) == captioner(world, 0, (4, 0))
    assert len({captioner(concepts, 0, (epoch, 0)) for epoch in range(12)}) > 3


def test_some_captions_say_nothing(world: PictureSet) -> None:
    captioner = Captioner({world.folder: _world}, neutral=0.5)
    texts = [captioner(world, 1, (epoch, 1)) for epoch in range(100)]
    assert 30 < sum(text in NEUTRAL for text in texts) < 70
    assert {text for text in texts if text in NEUTRAL} == set(NEUTRAL)


def test_captioned_batches_hold_ids_beside_pixels(world: PictureSet) -> None:
    tokenizer = WordTokenizer(models.TEXT_LENGTH)
    captioner = Captioner({world.folder: _world})
    batches = Captioned(Pictures([world]), captioner, tokenizer)
    items = [(2, 5), (0, 1)]
    batch = batches.fetch(items)
    assert len(batches) == len(world)
    assert (batch["pixels"] == to_pixels(world.pixels[[5, 1]])).all()
    texts = [captioner(world, index, item) for item in items for index in [item[1]]]
    assert (batch["ids"] == tokenizer(texts)).all()


def test_conditioned_batches_take_cached_rows_and_fresh_text(world: PictureSet, concepts: PictureSet) -> None:
    torch.manual_seed(0)
    tokenizer = WordTokenizer(models.TEXT_LENGTH)
    text_encoder = models.build_text_encoder(len(tokenizer)).eval()
    total = len(world) + len(concepts)
    latents = np.arange(total, dtype=np.float16)[:, None]
    chosen = Pictures([world, concepts], rows=np.array([1, len(world), 3]))
    captioner = Captioner({world.folder: _world, concepts.folder: _concept})
    batches = Conditioned(chosen, captioner, tokenizer, text_encoder, {"latents": latents})
    batch = batches.fetch([(0, 1), (0, 2)])
    assert batch["latents"][:, 0].tolist() == [len(world), 3]
    assert batch["time_ids"].tolist() == [list(TIME_IDS)] * 2
    texts = [captioner(concepts, 0, (0, 1)), captioner(world, 3, (0, 2))]
    with torch.no_grad():
        embeds, pooled = models.encode_text(text_encoder, tokenizer(texts))
    assert torch.equal(batch["text"], embeds) and torch.equal(batch["pooled"], pooled)


def _numbered_tokens(count: int) -> np.ndarray:
    return np.repeat(np.arange(count, dtype=np.float16), 2 * 3).reshape(count, 2, 3)


def test_given_parts_are_the_targets_own_padded_with_white(concepts: PictureSet) -> None:
    white = torch.full((2, 3), -1.0)
    batches = Concepts(concepts, _numbered_tokens(len(concepts)), white)
    assert len(batches) == 6
    counts = []
    for epoch in range(40):
        for index in range(6):
            batch = batches.fetch([(epoch, index)])
            row = int(batch["target"][0, 0, 0])
            assert VIEWS[concepts.labels[row, -1]] == "whole" and concepts.groups[row] == index
            slots = batch["cond"][0].unflatten(0, (3, 2))[:, 0, 0].int().tolist()
            given = [slot for slot in slots if slot >= 0]
            assert slots == given + [-1] * (3 - len(given)), "white comes last"
            assert len(set(given)) == len(given)
            assert all(concepts.groups[part] == index and part != row for part in given)
            counts.append(len(given))
    share = np.bincount(counts, minlength=4) / len(counts)
    assert 0.04 < share[0] < 0.18 and share[1:].min() > 0.2


def test_concept_batches_depend_on_epoch_and_index_alone(concepts: PictureSet) -> None:
    batches = Concepts(concepts, _numbered_tokens(len(concepts)), torch.zeros(2, 3))
    one, again = batches.fetch([(3, 2), (3, 4)]), batches.fetch([(3, 4), (3, 2)])
    assert torch.equal(one["cond"][0], again["cond"][1])
    assert torch.equal(one["target"][1], again["target"][0])
    varied = {tuple(batches.fetch([(epoch, 2)])["cond"].flatten().tolist()) for epoch in range(10)}
    assert len(varied) > 3


# what frozen models made of them


class _Means:
    """Channel means of the pixels times a factor, counting the pictures that it saw."""

    def __init__(self, factor: float = 1.0, fails_after: int = 10**6) -> None:
        self.factor, self.fails_after, self.seen = factor, fails_after, 0

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.seen + len(pixels) > self.fails_after:
            raise KeyboardInterrupt
        self.seen += len(pixels)
        return self.factor * pixels.mean((2, 3))


def test_cached_rows_are_made_once(tmp_path: Path, world: PictureSet) -> None:
    make = _Means()
    values = cached(tmp_path, "means", [world], make, chunk=5)
    assert values.dtype == np.float16 and make.seen == len(world) + 1  # one to learn the shape
    expected = to_pixels(world.pixels[:]).mean((2, 3)).half().numpy()
    assert (values == expected).all()
    again = _Means()
    assert (cached(tmp_path, "means", [world], again) == expected).all() and again.seen == 0


def test_only_chosen_rows_are_cached(tmp_path: Path, world: PictureSet, concepts: PictureSet) -> None:
    rows = np.array([2, len(world) + 1])
    values = cached(tmp_path, "means", [world, concepts], _Means(), rows)
    assert len(values) == len(world) + len(concepts)
    assert set(np.flatnonzero(np.asarray(values).any(1))) == set(rows)


def test_caching_goes_on_where_it_was_interrupted(tmp_path: Path, world: PictureSet) -> None:
    """A mark is written every 50 chunks, of one picture each here."""
    rows = np.resize(np.arange(len(world)), 60)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, "means", [world], _Means(fails_after=55), rows, chunk=1)
    assert json.loads((tmp_path / "means.json").read_text())["rows"] == 50
    rest = _Means()
    cached(tmp_path, "means", [world], rest, rows, chunk=1)
    assert rest.seen == 10 + 1


def _share_caching(folder: Path, world: PictureSet) -> None:
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)  # the fork has inherited a single-process state
    make = _Means()
    cached(folder, "means", [world], make, chunk=2)
    (folder / f"seen-{PartialState().process_index}").write_text(str(make.seen - 1))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_processes_share_the_caching(tmp_path: Path, world: PictureSet) -> None:
    from accelerate import debug_launcher

    debug_launcher(_share_caching, args=(tmp_path, world), num_processes=2)
    seen = [int((tmp_path / f"seen-{index}").read_text()) for index in (0, 1)]
    assert sum(seen) == len(world) and min(seen) > 0
    again = _Means()
    values = cached(tmp_path, "means", [world], again)
    assert again.seen == 0
    assert (values == to_pixels(world.pixels[:]).mean((2, 3)).half().numpy()).all()


def test_what_other_weights_made_is_made_anew(tmp_path: Path, world: PictureSet) -> None:
    cached(tmp_path, "means", [world], _Means(), of="step 1")
    newer = _Means(2.0)
    values = cached(tmp_path, "means", [world], newer, of="step 2")
    assert newer.seen == len(world) + 1
    assert np.allclose(values, 2 * to_pixels(world.pixels[:]).mean((2, 3)).numpy(), atol=2e-3)
