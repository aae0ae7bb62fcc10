"""Sets of parts out of folders, numbered files, and records."""

import os
import time
from pathlib import Path

import pytest

from pit_core import runs
from pit_core.errors import PitError
from pit_core.runs import (
    LARGE,
    Record,
    RunFolder,
    file_entry,
    fingerprint,
    hashes_file,
    matched_paths,
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


def test_patterns_are_replaced_by_what_they_match(parts: Path) -> None:
    """cmd.exe and PowerShell hand `parts\\*.png` on as it is."""
    assert matched_paths([parts / "tails" / "1.webp", parts / "eyes" / "*.png", parts / "[ab].*"]) == [
        parts / "tails" / "1.webp",
        *(parts / "eyes" / "1.png", parts / "eyes" / "2.png"),
        *(parts / "a.png", parts / "b.jpg"),
    ]
    assert matched_paths([parts / "?.png"]) == [parts / "a.png"]
    assert matched_paths([parts / "*"]) == sorted(p for p in parts.iterdir() if p.name != ".hidden")
    missing = parts / "wing.png"  # no pattern: the reader says what is missing
    assert matched_paths([missing]) == [missing]
    with pytest.raises(PitError, match=r"^Nothing matches the pattern '.*\*.gif'; .*\.$"):
        matched_paths([parts / "*.gif"])


def test_a_pattern_in_the_working_folder_gives_plain_names(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts)
    assert matched_paths([Path("*.png"), Path("*", "1.*")]) == [
        *(Path("a.png"), Path("eyes/1.png"), Path("tails/1.webp"))
    ]


def test_names_that_look_like_patterns_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "wings [old]"
    folder.mkdir()
    for name in ("a.png", "b[1].png"):
        (folder / name).touch()
    assert matched_paths([folder / "b[1].png"]) == [folder / "b[1].png"]
    assert matched_paths([folder / "*.png"]) == [folder / "a.png", folder / "b[1].png"]


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
        first.add("concept-01.png").touch()
    (tmp_path / "out" / "998-contact-sheet.png").touch()
    (tmp_path / "out" / "12-mine.png").touch()
    second = RunFolder(tmp_path / "out")
    assert second.path("record.json").name == "999-record.json"
    with second.writing():
        second.add("record.json").touch()
    assert RunFolder(tmp_path / "out").number == 1000


def test_two_runs_at_once_take_two_numbers(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out")
    with first.writing(), second.writing():
        for run in (first, second):
            run.add("concept-01.png").write_text(str(run.number))
    names = ["001-concept-01.png", "002-concept-01.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert [(tmp_path / "out" / name).read_text() for name in names] == ["1", "2"]


def test_a_failed_run_leaves_another_ones_files_alone(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "out"), RunFolder(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), first.writing(), second.writing():
        first.add("concept-01.png").touch()
        second.add("concept-01.png").touch()
        raise ZeroDivisionError
    assert not (tmp_path / "out").exists()
    with pytest.raises(ZeroDivisionError), first.writing():
        with second.writing():
            second.add("record.json").touch()
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["002-record.json"]


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


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A large file that was written an hour ago, and an empty cache of hashes."""
    for name in ("HOME", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setattr(runs, "_hashes", {})
    path = tmp_path / "models" / "model.safetensors"
    path.parent.mkdir()
    path.touch()
    os.truncate(path, LARGE)
    _an_hour_ago(path)
    return path


def _an_hour_ago(path: Path, seconds: int = 3600) -> None:
    when = time.time_ns() // 10**9 - seconds
    os.utime(path, (when, when))


def _change_unseen(path: Path) -> None:
    """Another content, the same size and time: whoever still gives the old hash has not read it again."""
    when = path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(when, when))


@pytest.mark.parametrize("forget", [False, True])
def test_a_large_file_is_read_once(large: Path, forget: bool) -> None:
    before = fingerprint(large), fingerprint(large.parent)
    _change_unseen(large)
    if forget:  # as another run does
        runs._hashes.clear()
    assert (fingerprint(large), fingerprint(large.parent)) == before
    fresh = fingerprint(large, fresh=True)
    assert fresh != before[0]
    assert fingerprint(large) == fresh


def test_a_large_file_that_changed_is_read_again(large: Path) -> None:
    before = fingerprint(large)
    _change_unseen(large)
    _an_hour_ago(large, 1800)
    assert fingerprint(large) != before
    os.truncate(large, LARGE + 1)
    assert len({before, fingerprint(large)}) == 2


def test_what_is_small_or_was_just_written_is_read_every_time(large: Path) -> None:
    os.truncate(large, LARGE - 1)
    _an_hour_ago(large)
    small = fingerprint(large)
    _change_unseen(large)
    assert fingerprint(large) != small
    os.truncate(large, LARGE)
    new = fingerprint(large)
    with large.open("r+b") as file:
        file.write(b"y")
    assert fingerprint(large) != new


@pytest.mark.parametrize("content", ["{", "[]", '{"files": [1]}', '{"files": {"a": 1}}', "[" * 100_000])
def test_a_damaged_cache_of_hashes_is_replaced(large: Path, content: str) -> None:
    hashes_file().parent.mkdir(parents=True)
    hashes_file().write_text(content)
    before = fingerprint(large)
    runs._hashes.clear()
    _change_unseen(large)
    assert fingerprint(large) == before


def test_hashes_that_cannot_be_kept_are_no_error(large: Path) -> None:
    (large.parent.parent / "home").write_text("a file in the way")
    assert fingerprint(large) == fingerprint(large)


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
