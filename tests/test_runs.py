"""Sets of parts out of folders, numbered files, and records."""

import os
from pathlib import Path

import pytest

from pit_core.errors import PitError
from pit_core.runs import (
    Record,
    RunFolder,
    file_entry,
    fingerprint,
    part_kinds,
    random_sets,
    read_record,
    recorded_file,
    write_record,
)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    folder = tmp_path / "parts"
    names = ("a.png", "b.jpg", "eyes/1.png", "eyes/2.png", "tails/1.webp", ".hidden/1.png", "notes/read.txt")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_subfolders_are_kinds_and_other_files_kinds_of_their_own(parts: Path) -> None:
    kinds = {Path(kind).name: [path.name for path in files] for kind, files in part_kinds([parts]).items()}
    assert kinds == {"a.png": ["a.png"], "b.jpg": ["b.jpg"], "eyes": ["1.png", "2.png"], "tails": ["1.webp"]}
    single = part_kinds([parts / "eyes" / "1.png", parts / "tails"])
    assert [len(files) for files in single.values()] == [1, 1]


def test_folders_without_pictures_are_refused(parts: Path) -> None:
    with pytest.raises(PitError, match="holds no pictures"):
        part_kinds([parts / "notes"])
    with pytest.raises(PitError, match="There is no file"):
        part_kinds([parts / "wings"])


def test_random_sets_vary_and_repeat(parts: Path) -> None:
    sets = random_sets([parts], 200, 7, most=3)
    assert sets == random_sets([parts], 200, 7, most=3)
    assert sets[:50] == random_sets([parts], 50, 7, most=3)  # more sets go on where fewer stopped
    assert sets != random_sets([parts], 200, 8, most=3)
    sizes = [len(each) for each in sets]
    assert all(sizes.count(size) > 40 for size in (1, 2, 3))
    for each in sets:
        kinds = [path if path.parent == parts else path.parent for path in each]
        assert len(set(kinds)) == len(kinds)
    assert max(len(each) for each in random_sets([parts], 50, 0, most=9)) == 4


def test_runs_are_numbered_and_never_meet(tmp_path: Path) -> None:
    first = RunFolder(tmp_path / "out")
    with first.writing():
        first.add("concept-01.png").parent.mkdir()
        first.add("concept-01.png").touch()
    (tmp_path / "out" / "998-contact-sheet.png").touch()
    (tmp_path / "out" / "12-mine.png").touch()
    second = RunFolder(tmp_path / "out")
    assert second.path("record.json").name == "999-record.json"
    with second.writing():
        second.add("record.json").touch()
    assert RunFolder(tmp_path / "out").number == 1000


def test_a_failed_run_removes_its_own_files_only(tmp_path: Path) -> None:
    (tmp_path / "001-concept-01.png").touch()
    run = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), run.writing():
        run.add("concept-01.png").touch()
        run.add("concept-02.png")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["001-concept-01.png"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="an administrator may write everywhere")
def test_a_read_only_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PitError, match="cannot be written to"):
        RunFolder(tmp_path / "out")


def test_fingerprints_follow_content_not_names_around_it(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "config.json").write_text("{}")
        (tmp_path / name / "README.md").write_text(name)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    (tmp_path / "b" / "unet" / "config.json").write_text("{ }")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")


@pytest.mark.parametrize("name", ["prior.ckpt", "cfg.yaml", "model.safetensors", "pytorch_model.bin"])
def test_every_file_of_a_model_folder_counts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a")
    before = fingerprint(tmp_path)
    (tmp_path / name).write_text("b")
    assert fingerprint(tmp_path) != before


def test_a_disk_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Z:\\out is on Windows, where not even the topmost folder has to exist."""
    monkeypatch.setattr(Path, "exists", lambda _self: False)
    with pytest.raises(PitError, match="cannot be written to"):
        RunFolder(tmp_path / "out")


def test_a_record_and_its_files_can_move_together(tmp_path: Path) -> None:
    part, record = tmp_path / "here" / "part.png", tmp_path / "here" / "out" / "001-record.json"
    record.parent.mkdir(parents=True)
    part.write_bytes(b"x")
    entry = file_entry(part, record.parent)
    assert entry["path"] == "../part.png"
    write_record(record, Record({"name": "miniature"}, {"steps": 2}, [{"parts": [entry]}], ["pit", "sample"]))
    (tmp_path / "here").rename(tmp_path / "there")
    moved = tmp_path / "there" / "out" / "001-record.json"
    read = read_record(moved)
    assert (read.settings, read.command) == ({"steps": 2}, ["pit", "sample"])
    found = recorded_file(read.jobs[0]["parts"][0], moved)
    assert found == tmp_path / "there" / "part.png"
    found.write_bytes(b"y")
    with pytest.raises(PitError, match="has changed"):
        recorded_file(entry, moved)
    for broken in (None, {}, {"path": 3}, {"path": "a\0b"}):
        with pytest.raises(PitError, match="is damaged"):
            recorded_file(broken, moved)
