"""Broken pictures are found before training, reported, and left out."""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from pit_core.errors import PitError
from pit_core.parts.look import Skipped, look_at
from pit_core.parts.manifest import Whole
from pit_core.parts.scan import readable


def _picture(path: Path, colour: str = "red") -> None:
    Image.new("RGB", (20, 20), colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "a_0.png", "a_1.png", "a_2.png"):
        _picture(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<html>")
    _picture(tmp_path / "white.png", "white")
    Image.new("RGBA", (9, 9), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    return tmp_path


def _scan(wholes: list[Whole], folder: Path, memory: Path | None = None) -> tuple[list[Whole], list[Skipped]]:
    return readable(wholes, folder, memory, quiet=True)


@pytest.mark.filterwarnings("error")
def test_whole_sets_pass_without_a_word(folder: Path) -> None:
    wholes = [Whole("a.png", ("a_0.png", "a_1.png"), ((0, 0, 1, 1), None)), Whole("b.png")]
    assert _scan(wholes, folder) == (wholes, [])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cut.png", "damaged or cut short"),
        ("empty.png", "is empty"),
        ("page.png", "not a picture"),
        ("missing.png", "There is no file"),
        ("white.png", "shows nothing"),
        ("clear.png", "shows nothing"),
        ("../a.png", "not a usable name"),
    ],
)
def test_a_broken_part_goes_with_its_box_and_a_broken_target_with_its_whole(
    folder: Path, name: str, reason: str
) -> None:
    boxes = ((0, 0, 1, 1), (0, 0, 2, 2), (0, 0, 3, 3))
    wholes = [Whole("a.png", ("a_0.png", name, "a_1.png"), boxes), Whole("b.png", ("a_2.png",))]
    with pytest.warns(UserWarning, match=reason):
        kept, skipped = _scan(wholes, folder)
    assert kept == [Whole("a.png", ("a_0.png", "a_1.png"), (boxes[0], boxes[2])), wholes[1]]
    assert [item.file for item in skipped] == [name]
    with pytest.warns(UserWarning, match=reason):
        assert _scan([Whole(name, ("a_0.png",)), wholes[1]], folder)[0] == [wholes[1]]


def test_a_whole_without_one_part_left_goes_but_one_that_never_had_any_stays(folder: Path) -> None:
    with pytest.warns(UserWarning, match="None of the parts of 'a.png'"):
        kept, skipped = _scan([Whole("a.png", ("cut.png", "white.png")), Whole("b.png")], folder)
    assert kept == [Whole("b.png")]
    assert [item.file for item in skipped] == ["cut.png", "white.png", "a.png"]


def test_nothing_left_is_an_error(folder: Path) -> None:
    with pytest.raises(PitError, match="None of the 1 wholes can be used; the first: 'cut.png' is damaged"):
        _scan([Whole("cut.png")], folder)


def test_only_new_and_changed_files_are_looked_at_again(folder: Path) -> None:
    memory = folder / "seen.json"
    wholes = [Whole("a.png"), Whole("b.png")]
    assert _scan(wholes, folder, memory) == (wholes, [])
    seen = json.loads(memory.read_text())
    # what the memory says of a file that has not changed is believed, of one that has it is not
    seen["a.png"]["error"] = seen["b.png"]["error"] = "as remembered."
    memory.write_text(json.dumps(seen))
    os.utime(folder / "b.png", ns=(1, 1))
    with pytest.warns(UserWarning, match="as remembered"):
        assert _scan(wholes, folder, memory)[0] == [Whole("b.png")]
    memory.write_text("{")
    assert _scan(wholes, folder, memory) == (wholes, [])


def test_a_look_that_breaks_off_is_not_repeated(folder: Path) -> None:
    memory, names = folder / "seen.json", ["a.png", "b.png", "a_0.png"]
    opened: list[str] = []
    written: dict[str, object] = {}

    def check(name: str, picture: Image.Image) -> None:
        opened.append(name)
        if name == "a_0.png" and not written:
            for _ in range(500):  # what came before is written while this one is looked at
                if memory.is_file():
                    written.update(json.loads(memory.read_text()))
                    break
                time.sleep(0.01)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        look_at(names, folder, memory, check=check, save_every=0, quiet=True)
    assert set(written) <= {"a.png", "b.png"} and written  # a kill would have left as much
    assert set(json.loads(memory.read_text())) == {"a.png", "b.png"}
    found = look_at(names, folder, memory, check=check, quiet=True)
    assert set(found) == set(names) and sorted(opened) == ["a.png", "a_0.png", "a_0.png", "b.png"]
    assert found["a.png"]["sha256"] and (found["a.png"]["width"], found["a.png"]["height"]) == (20, 20)
