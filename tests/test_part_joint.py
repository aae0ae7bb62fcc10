"""Several folders of embedded part data as one set."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from pit_core.errors import PitError
from pit_core.parts.augment import Augment
from pit_core.parts.joint import JointTokens, shares, split_folders
from pit_core.parts.shards import Index, write_index, write_shard, write_white
from pit_core.parts.token_data import TokenData, split_rows
from pit_core.train.loop import LoopConfig, _Batches

TOKENS, WIDTH, KEY = 2, 3, "0" * 64
SIZES = (7, 2, 4)
AUGMENT = Augment(max_crops=1, sketch_prob=0.25)


PLAIN = Index(KEY, (), TOKENS, WIDTH, 1, AUGMENT)


def write(folder: Path, wholes: int, number: int, index: Index = PLAIN) -> Path:
    """A folder whose n-th whole is 100 * number + n all over, in shards of up to three wholes."""
    rows = [{"target": torch.full((TOKENS, WIDTH), 100.0 * number + n).half()} for n in range(wholes)]
    shards = []
    for start in range(0, wholes, 3):
        name = f"shards/{start}.tar"
        write_shard(folder / name, rows[start : start + 3])
        shards.append((name, len(rows[start : start + 3])))
    write_white(folder, KEY, torch.zeros(TOKENS, WIDTH))
    write_index(folder, replace(index, shards=tuple(shards)))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("joint")
    return [write(root / str(number), size, number) for number, size in enumerate(SIZES)]


def joint(folders: list[Path], *weights: float, seed: int = 0) -> JointTokens:
    starts = [sum(SIZES[:number]) for number in range(len(SIZES))]
    data = [
        TokenData(path, seed=seed, first=start, most_open=1)
        for path, start in zip(folders, starts, strict=True)
    ]
    return JointTokens(data, weights, seed=seed)


def shown(data: JointTokens, *epochs: int) -> list[int]:
    """Which wholes these epochs show, in order."""
    items = [(epoch, index) for epoch in epochs for index in range(len(data))]
    return [int(target) for target in data.fetch(items)["target"][:, 0, 0]]


def test_by_size_every_whole_comes_once_an_epoch(folders: list[Path]) -> None:
    data = joint(folders)
    everything = [100 * number + n for number, size in enumerate(SIZES) for n in range(size)]
    assert len(data) == 13 and data.shards == [name for f in data.folders for name, _ in f.index.shards]
    assert shown(data, 0) == shown(data, 5) == everything


def test_weights_give_each_folder_its_share_and_leave_no_whole_out(folders: list[Path]) -> None:
    data = joint(folders, 1, 1, 2)
    assert data.counts == [3, 3, 7] and len(data) == 13
    for epoch in range(3):
        assert Counter(number // 100 for number in shown(data, epoch)) == {0: 3, 1: 3, 2: 7}
    # Seven epochs take 21 of the first folder's seven: each whole three times.
    seen = Counter(shown(data, *range(7)))
    assert all(seen[n] == 3 for n in range(7))
    assert {seen[200 + n] for n in range(4)} <= {12, 13}
    # Which ones an epoch shows is drawn, not the order in the folder.
    assert any(sorted(n for n in shown(data, epoch) if n < 100) != [0, 1, 2] for epoch in (0, 7, 14))


def test_an_example_depends_on_seed_epoch_and_index_alone(folders: list[Path]) -> None:
    one, again, other = joint(folders, 3, 1, 1), joint(folders, 3, 1, 1), joint(folders, 3, 1, 1, seed=1)
    backwards = [again.fetch([(4, index)])["target"] for index in reversed(range(len(again)))][::-1]
    assert torch.equal(one.fetch([(4, index) for index in range(13)])["target"], torch.cat(backwards))
    assert shown(one, 0, 1, 2) != shown(other, 0, 1, 2)

    def batches(workers: int) -> list[torch.Tensor]:
        source = _Batches(joint(folders, 3, 1, 1), LoopConfig(steps=3, batch_size=4), 0, 1)
        loader = DataLoader(source, batch_size=None, sampler=range(3), num_workers=workers)
        return [batch["target"] for batch in loader]

    assert all(torch.equal(a, b) for a, b in zip(batches(0), batches(1), strict=True))


def test_shares_are_whole_numbers_that_sum_up() -> None:
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(7, [0.5, 0.25, 0.25]) == [3, 2, 2]
    assert shares(1, [1e-9, 1.0]) == [0, 1]
    assert sum(shares(1_000_003, [0.1, 0.7, 3.3])) == 1_000_003


def test_held_out_rows_are_those_of_the_folders_laid_end_to_end() -> None:
    rows, held = split_rows(13, 4, 3)
    split = split_folders(SIZES, 4, 3)
    starts = (0, 7, 9)
    assert [start + row for start, (own, _) in zip(starts, split, strict=True) for row in own] == rows
    assert [start + row for start, (_, own) in zip(starts, split, strict=True) for row in own] == held
    assert split_folders([13], 4, 3) == [(rows, held)]


def test_settings_that_need_not_agree_are_merged(folders: list[Path], tmp_path: Path) -> None:
    index = replace(PLAIN, augment=replace(AUGMENT, sketch_prob=0.5, rotate_prob=0.0))
    data = JointTokens([TokenData(folders[0]), TokenData(write(tmp_path, 1, 9, index))])
    assert data.settings == replace(AUGMENT, sketch_prob=0.5)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (replace(PLAIN, adapter="other"), "with different models"),
        (
            Index(KEY, (), TOKENS, WIDTH, 1, replace(AUGMENT, max_crops=2)),
            "different max_crops; set max_crops",
        ),
        (replace(PLAIN, augment=replace(AUGMENT, use_ref=True)), "different use_ref"),
    ],
)
def test_folders_that_do_not_belong_together_are_refused(
    index: Index, said: str, folders: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(PitError, match=said) as error:
        JointTokens([TokenData(folders[0]), TokenData(write(tmp_path / "odd", 3, 1, index))])
    assert str(folders[0]) in str(error.value) and "odd" in str(error.value)


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, float("inf"), 1.0)])
def test_weights_that_do_not_fit_are_refused(weights: tuple[float, ...], folders: list[Path]) -> None:
    with pytest.raises(PitError, match="a weight above 0 for each of the 3 folders"):
        joint(folders, *weights)


def test_a_weighted_folder_needs_a_whole_of_its_own(folders: list[Path]) -> None:
    data = [TokenData(folders[0]), TokenData(folders[1], rows=[])]
    assert len(JointTokens(data)) == 7
    with pytest.raises(PitError, match="has no whole to train on"):
        JointTokens(data, [1.0, 1.0])
