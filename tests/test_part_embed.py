"""Part data encoded once: what its tokens are, that shards are whole or absent, how training reads them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_parts
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import DataLoader

from pit_core.errors import PitError
from pit_core.ip_adapter.adapter import IPAdapter
from pit_core.ip_adapter.encode import ImageEncoder, encode_tokens
from pit_core.parts.augment import Augment
from pit_core.parts.canvas import on_white_square, reference_grid
from pit_core.parts.embed import Embedded, Encoder, _dead_workers_named, embed
from pit_core.parts.manifest import read_manifest, write_manifest
from pit_core.parts.shards import Shard, as_tensor, read_index, read_white
from pit_core.parts.token_data import TokenData, split_rows
from pit_core.parts.views import Recipe
from pit_core.train.loop import LoopConfig, _Batches

Models = tuple[ImageEncoder, IPAdapter]
PLAIN = Augment(crop_prob=0, rotate_prob=0, sketch_prob=0, empty_prob=0, fill=(1.0, 1.0))
RECIPE = Recipe(tiny_parts.PIXELS, views=2)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_parts.write_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny_parts.image_encoder(), tiny_parts.adapter()


@pytest.fixture(scope="module")
def run(manifest: Path, models: Models) -> Callable[..., Embedded]:
    def call(out: Path, recipe: Recipe = RECIPE, source: Path = manifest, **options: Any) -> Embedded:
        options = {"shard_size": 4, "quiet": True} | options
        return embed(source, out, options.pop("encode", None) or Encoder(*models), recipe, **options)

    return call


@pytest.fixture(scope="module")
def folder(run: Callable[..., Embedded], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole set, with references."""
    out = tmp_path_factory.mktemp("tokens")
    run(out, replace(RECIPE, augment=replace(PLAIN, use_ref=True)))
    return out


def shards(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "shards").iterdir())}


# what is encoded


def test_tokens_are_those_of_the_squares(folder: Path, manifest: Path, models: Models) -> None:
    index = read_index(folder)
    first = Shard(folder / index.shards[0][0])
    assert [count for _, count in index.shards] == [4, 4, 2]
    assert len(first) == 4

    def expected(name: str) -> Tensor:
        square = on_white_square(Image.open(manifest.parent / name), tiny_parts.PIXELS, fill=1.0)
        return encode_tokens(*models, models[0].preprocess(square))[0]

    whole = {name: as_tensor(array).float() for name, array in first[2].items()}
    assert whole["target"].shape == (tiny_parts.TOKENS, tiny_parts.WIDTH)
    torch.testing.assert_close(whole["target"], expected("2.png"), rtol=2e-3, atol=2e-3)
    assert whole["parts"].shape == (2, 2, tiny_parts.TOKENS, tiny_parts.WIDTH)
    for number, views in enumerate(whole["parts"]):  # nothing is changed by chance, so both views are one
        own = expected(f"2_{number}.png").expand(2, -1, -1)
        torch.testing.assert_close(views, own, rtol=2e-3, atol=2e-3)
    assert "parts" not in first[0]
    white = encode_tokens(*models, models[0].preprocess(Image.new("RGB", (8, 8), "white")))[0]
    torch.testing.assert_close(read_white(folder, index), white, rtol=2e-3, atol=2e-3)


def test_references_show_four_siblings_in_as_many_views(folder: Path, manifest: Path, models: Models) -> None:
    index = read_index(folder)
    found = Shard(folder / index.shards[0][0])[0]["reference"]
    assert found.shape == (2, tiny_parts.TOKENS, tiny_parts.WIDTH)
    assert difference(as_tensor(found[0]).float(), as_tensor(found[1]).float()) > 1e-3
    own = Image.open(manifest.parent / "0.png")
    alone = encode_tokens(*models, models[0].preprocess(reference_grid([own] * 4, tiny_parts.PIXELS)))
    assert difference(as_tensor(found[0]).float(), alone[0]) > 1e-3


def test_a_shard_is_a_tar_of_safetensors_that_anybody_can_read(folder: Path) -> None:
    path = folder / read_index(folder).shards[0][0]
    with tarfile.open(path) as tar:
        names = tar.getnames()
        data = tar.extractfile(names[1])
        assert data is not None
        tensors = load(data.read())
    assert names == [f"00000{i}.safetensors" for i in range(4)]
    ours = Shard(path)[1]
    assert all(torch.equal(as_tensor(ours[name]), tensor) for name, tensor in tensors.items())
    assert tensors.keys() == ours.keys() == {"target", "parts", "reference"}


# once, and only once


class Counting(Encoder):
    """Counts pictures, and may break off."""

    seen, limit = 0, 10**9

    def __call__(self, pixels: Tensor) -> Tensor:
        if self.seen >= self.limit:
            raise KeyboardInterrupt
        self.seen += len(pixels)
        return super().__call__(pixels)


def test_a_run_that_breaks_off_loses_nothing_complete_and_repeats_nothing(
    run: Callable[..., Embedded], models: Models, tmp_path: Path
) -> None:
    whole, first, second = (Counting(*models) for _ in range(3))
    run(tmp_path / "whole", encode=whole)
    first.limit = whole.seen // 2
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", encode=first)
    assert len(shards(tmp_path / "parts")) == 2
    with pytest.raises(PitError, match=r"finished `pit data embed`"):
        read_index(tmp_path / "parts")
    done = run(tmp_path / "parts", encode=second)
    assert (done.made, first.seen + second.seen) == (1, whole.seen)
    assert shards(tmp_path / "parts") == shards(tmp_path / "whole")
    index = (tmp_path / "parts" / "index.json").read_bytes()
    assert index == (tmp_path / "whole" / "index.json").read_bytes()
    again = Counting(*models)
    assert run(tmp_path / "parts", encode=again).made == 0
    assert again.seen == 0


def test_a_killed_process_goes_on_where_it_was(tmp_path: Path, root: Path) -> None:
    manifest, out = tiny_parts.write_set(tmp_path / "set", 12), tmp_path / "out"
    code = f"""
import sys
sys.path[:0] = [{str(root)!r}, {str(root / "tests" / "support")!r}]
import tiny_parts, torch
torch.set_num_threads(1)
from pathlib import Path
from pit_core.parts.embed import Encoder, embed
from pit_core.parts.views import Recipe
encode = Encoder(tiny_parts.image_encoder(), tiny_parts.adapter())
recipe = Recipe(tiny_parts.PIXELS, views=40)
embed(Path(sys.argv[1]), Path(sys.argv[2]), encode, recipe, shard_size=1, quiet=True)
"""
    command = [sys.executable, "-c", code, str(manifest), str(out)]
    child = subprocess.Popen(command)
    while child.poll() is None and len(list(out.glob("shards/*.tar"))) < 3:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    child.wait()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shards/*.tar")}
    assert 3 <= len(kept) < 12 and not (out / "index.json").exists()
    assert subprocess.run(command, env=os.environ).returncode == 0
    assert len(read_index(out)) == 12
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_names_follow_content_recipe_and_models(
    run: Callable[..., Embedded], models: Models, tmp_path: Path
) -> None:
    source = tiny_parts.write_set(tmp_path / "set", 6)
    out = tmp_path / "out"
    assert run(out, source=source).made == 2
    # Other names and provenance, the same pictures: nothing to do.
    wholes = read_manifest(source)
    (source.parent / "0.png").rename(source.parent / "renamed.png")
    write_manifest(source, [replace(wholes[0], target="renamed.png", provenance={"by": "me"}), *wholes[1:]])
    assert run(out, source=source).made == 0
    tiny_parts.draw_blob(source.parent / "5.png", (1, 2, 3))
    assert run(out, source=source).made == 1
    for other in (replace(RECIPE, seed=1), replace(RECIPE, views=1), replace(RECIPE, augment=PLAIN)):
        assert run(out, other, source=source).made == 2
    # What only training uses needs no new tokens.
    assert run(out, replace(RECIPE, augment=Augment(max_crops=7, empty_prob=0)), source=source).made == 0
    assert run(out, encode=Encoder(tiny_parts.image_encoder(seed=9), models[1]), source=source).made == 2


def test_shards_of_earlier_data_stay_unless_they_are_pruned(
    run: Callable[..., Embedded], tmp_path: Path
) -> None:
    source, out = tiny_parts.write_set(tmp_path / "set", 6), tmp_path / "out"
    wholes = read_manifest(source)
    write_manifest(source, wholes[:5])
    first = run(out, source=source)
    assert (first.made, first.unused) == (2, 0) and "older" not in str(first)
    write_manifest(source, wholes)  # the last shard was not full
    grown = run(out, source=source)
    assert (grown.made, grown.unused) == (1, 1) and "(1 older ones not used" in str(grown)
    others = [out / "shards" / name for name in ("mine.tar", f"{'0' * 40}.tar.part", "note.txt")]
    for path in others:
        path.touch()
    pruned = run(out, source=source, prune=True)
    assert (pruned.made, pruned.unused) == (0, 1) and "(1 older ones deleted)" in str(pruned)
    assert set((out / "shards").iterdir()) == {*others, *(out / name for name, _ in pruned.index.shards)}
    assert len(TokenData(out).fetch([(0, 5)])["target"]) == 1


def test_equal_pictures_have_equal_views_wherever_they_stand(
    run: Callable[..., Embedded], tmp_path: Path
) -> None:
    source = tiny_parts.write_set(tmp_path / "set", 6)
    run(tmp_path / "a", source=source)
    write_manifest(source, read_manifest(source)[::-1])
    run(tmp_path / "b", source=source)
    first, last = TokenData(tmp_path / "a").wholes[5], TokenData(tmp_path / "b").wholes[0]
    assert all(abs(first[name] - last[name]).max() < 1e-2 for name in ("target", "parts"))


def test_worker_processes_make_the_same_shards(run: Callable[..., Embedded], tmp_path: Path) -> None:
    run(tmp_path / "alone")
    run(tmp_path / "workers", workers=2)
    assert shards(tmp_path / "alone") == shards(tmp_path / "workers")


class Killing(Encoder):
    """Kills the processes that decode, once the first shard is there."""

    calls = 0

    def __call__(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        for child in multiprocessing.active_children() if self.calls == 2 else ():
            child.kill()
            child.join()
        return super().__call__(pixels)


def test_a_killed_worker_is_told_in_a_sentence_and_the_run_goes_on(
    run: Callable[..., Embedded], models: Models, tmp_path: Path
) -> None:
    source = tiny_parts.write_set(tmp_path / "set", 12)
    with pytest.raises(PitError, match=r"^A process that decodes pictures was ended[^\n]*$"):
        run(tmp_path / "out", source=source, encode=Killing(*models), shard_size=1, workers=1)
    made = len(shards(tmp_path / "out"))
    assert 1 <= made < 12
    assert run(tmp_path / "out", source=source, shard_size=1).made == 12 - made


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionRefusedError(111, "Connection refused"),  # its pixels were announced; it died in between
        EOFError(),
    ],
)
def test_a_workers_death_is_told_alike_however_it_shows(error: Exception) -> None:
    with pytest.raises(PitError, match="^A process that decodes pictures was ended"), _dead_workers_named():
        raise error


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_meanwhile_is_named_in_a_sentence(
    workers: int, run: Callable[..., Embedded], tmp_path: Path
) -> None:
    source = tiny_parts.write_set(tmp_path / "set", 5)
    run(tmp_path / "out", source=source)
    for shard in (tmp_path / "out" / "shards").iterdir():
        shard.unlink()
    status = (source.parent / "4.png").stat()
    (source.parent / "4.png").write_bytes(b"x" * status.st_size)
    os.utime(source.parent / "4.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(PitError, match=r"^'4\.png' is not a picture[^\n]*$"):
        run(tmp_path / "out", source=source, workers=workers)


def test_broken_pictures_are_listed_and_left_out(run: Callable[..., Embedded], tmp_path: Path) -> None:
    source = tiny_parts.write_set(tmp_path / "set", 5)
    (source.parent / "2_0.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="is empty"):
        done = run(tmp_path / "out", source=source)
    assert [item.file for item in done.skipped] == ["2_0.png"]
    assert "2_0.png" in (tmp_path / "out" / "skipped.jsonl").read_text()
    assert len(TokenData(tmp_path / "out").wholes[2]["parts"]) == 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda models: Recipe(views=0), "at least 1 view"),
        (lambda models: Recipe(seed=-1), "seed"),
        (lambda models: Encoder(*models, batch=0), "at least 1 picture"),
    ],
)
def test_refuses_settings_out_of_range(call: Callable[..., Any], said: str, models: Models) -> None:
    with pytest.raises(PitError, match=said):
        call(models)


def test_shards_hold_at_least_one_whole(run: Callable[..., Embedded], tmp_path: Path) -> None:
    with pytest.raises(PitError, match="at least 1 whole"):
        run(tmp_path, shard_size=0)


# as training examples


def test_an_example_is_a_target_a_reference_and_its_own_parts_padded_with_white(folder: Path) -> None:
    data = TokenData(folder)
    white, length = data.white.half(), tiny_parts.TOKENS
    for index in range(10):
        batch, own = data.fetch([(0, index)]), data.wholes[index]
        assert torch.equal(batch["target"][0], as_tensor(own["target"]))
        slots = batch["cond"][0].split(length)
        assert len(slots) == 4
        assert any(torch.equal(slots[0], as_tensor(grid)) for grid in own["reference"])
        views = [as_tensor(view) for part in own.get("parts", ()) for view in part]
        shown = [slot for slot in slots[1:] if not torch.equal(slot, white)]
        assert len(shown) <= index % 3 and bool(shown) == bool(index % 3)
        assert all(any(torch.equal(slot, view) for view in views) for slot in shown)
        assert all(torch.equal(slot, white) for slot in slots[1 + len(shown) :])


def test_every_epoch_draws_other_parts_and_views_and_the_same_ones_again(folder: Path) -> None:
    data = TokenData(folder)
    drawn = [data.fetch([(epoch, 5)])["cond"] for epoch in range(12)]
    assert len({tuple(cond.flatten().tolist()) for cond in drawn}) > 4
    assert all(torch.equal(cond, TokenData(folder).fetch([(e, 5)])["cond"]) for e, cond in enumerate(drawn))
    assert not torch.equal(
        torch.cat(drawn), torch.cat([TokenData(folder, seed=1).fetch([(e, 5)])["cond"] for e in range(12)])
    )


def test_settings_of_the_choice_may_differ_from_those_of_the_embedding(folder: Path) -> None:
    tokens = tiny_parts.TOKENS
    bare = TokenData(folder, replace(PLAIN, max_crops=5, empty_prob=1.0))
    assert torch.equal(bare.fetch([(0, 5)])["cond"][0], bare.white.half().repeat(5, 1))
    unreferenced = TokenData(folder, replace(PLAIN, use_ref=True, reference_prob=0.0))
    assert torch.equal(unreferenced.fetch([(0, 5)])["cond"][0, :tokens], unreferenced.white.half())


def test_any_number_of_workers_reads_the_same_batches(folder: Path) -> None:
    config = LoopConfig(steps=3, batch_size=4)

    def batches(workers: int) -> list[dict[str, Tensor]]:
        source = _Batches(TokenData(folder), config, 0, 1)
        return list(DataLoader(source, batch_size=None, sampler=range(3), num_workers=workers))

    for a, b in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_rows_held_out_are_no_training_rows(folder: Path) -> None:
    kept, held = split_rows(10, 3, seed=4)
    assert sorted([*kept, *held]) == list(range(10)) and len(held) == 3
    assert split_rows(10, 3, seed=4) == (kept, held) != split_rows(10, 3, seed=5)
    assert split_rows(10, 0) == (list(range(10)), [])
    data = TokenData(folder, rows=held)
    assert len(data) == 3
    assert torch.equal(data.fetch([(0, 1)])["target"][0], as_tensor(data.wholes[held[1]]["target"]))
    with pytest.raises(PitError, match="hold out 0 to 9 of 10"):
        split_rows(10, 10)


def test_references_have_to_be_there(run: Callable[..., Embedded], tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(PitError, match="without references"):
        TokenData(tmp_path, replace(PLAIN, use_ref=True))


@pytest.mark.parametrize("keep", [0, 100, 700, 2000])
def test_a_damaged_shard_is_named(run: Callable[..., Embedded], tmp_path: Path, keep: int) -> None:
    run(tmp_path)
    shard = tmp_path / read_index(tmp_path).shards[0][0]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(PitError, match="cannot be read .* delete it"):
        TokenData(tmp_path).fetch([(0, 3)])


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"kind": "x"}', '{"kind": "ip_token_shards", "version": 9}']
)
def test_an_index_of_another_kind_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(PitError, match=r"index\.json"):
        read_index(tmp_path)
