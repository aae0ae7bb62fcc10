"""The manifest of part data: what it keeps, and what it refuses, by line."""

import json
from pathlib import Path

import pytest

from pit_core.errors import PitError
from pit_core.parts.manifest import Whole, read_manifest, write_manifest

GOOD = '{"target": "a.jpg"}'


def _read(folder: Path, content: str | bytes) -> list[Whole]:
    path = folder / "parts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_manifest(path)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    wholes = [
        Whole("elf/a.jpg", ("elf/a_0.png", "elf/a_1.png"), ((1, 2.5, 30, 40), None), "elf", {"seed": 7}),
        Whole("größe.png"),
    ]
    write_manifest(tmp_path / "parts.jsonl", wholes)
    assert read_manifest(tmp_path / "parts.jsonl") == wholes
    first, second = (tmp_path / "parts.jsonl").read_text("utf-8").splitlines()
    assert list(json.loads(first)) == ["target", "parts", "boxes", "set", "provenance"]
    assert second == '{"target": "größe.png"}'


def test_a_mark_at_the_start_windows_line_ends_and_empty_lines_are_fine(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + f'{GOOD}\r\n\r\n{{"target": "b.jpg"}}'.encode()
    assert [whole.target for whole in _read(tmp_path, content)] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "name",
    [
        "../a.jpg",
        "b/../../a.jpg",
        "/etc/a.jpg",
        "C:/a.jpg",
        "C:a.jpg",
        "..\\a.jpg",
        "//host/a.jpg",
        "~/a.jpg",
        "a\0.jpg",
        "aux.jpg",
        "",
        "./a.jpg",
        "\ud800.jpg",
        "way-out/a.jpg",
    ],
)
@pytest.mark.parametrize("key", ["target", "parts"])
def test_paths_stay_in_the_folder(tmp_path: Path, name: str, key: str) -> None:
    (tmp_path / "way-out").symlink_to(tmp_path.parent)
    line = {"target": name} if key == "target" else {"target": "x.jpg", "parts": [name]}
    with pytest.raises(
        PitError, match=r"^Line 2 of 'parts.jsonl' names a picture that may not be read: .*\.$"
    ):
        _read(tmp_path, f"{GOOD}\n{json.dumps(line)}\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"target": "b.jpg"', "is not readable as JSON"),
        ("[" * 100_000, "is not readable as JSON"),
        (b'{"target": "\xff.jpg"}', "is not readable as JSON"),
        ("[]", "should be an object .* got a list"),
        ("7", "should be an object .* got a number"),
        ("{}", "should have a path as 'target', got nothing"),
        ('{"target": null}', "should have a path as 'target', got null"),
        ('{"target": "b.jpg", "target": "c.jpg"}', "holds the key 'target' twice"),
        ('{"target": "b.jpg", "provenance": {"a": 1, "a": 2}}', "holds the key 'a' twice"),
        ('{"target": "b.jpg", "part": []}', "unknown key 'part'; did you mean 'parts'"),
        ('{"target": "b.jpg", "prompt": "x"}', "unknown key 'prompt'; .* into 'provenance'"),
        ('{"target": "b.jpg", "parts": "c.jpg"}', "a list of paths as 'parts', got text"),
        ('{"target": "b.jpg", "parts": [3]}', "by their paths, got a number"),
        ('{"target": "b.jpg", "parts": ["c.jpg", "c.jpg"]}', "names a picture twice"),
        ('{"target": "b.jpg", "parts": ["b.jpg"]}', "names a picture twice"),
        ('{"target": "b.jpg", "parts": ["c.jpg"], "boxes": [null, null]}', "2 boxes for 1 parts"),
        ('{"target": "b.jpg", "parts": ["c.jpg"], "boxes": [[1, 2, 3]]}', "has the box"),
        ('{"target": "b.jpg", "parts": ["c.jpg"], "boxes": [[9, 2, 3, 4]]}', "has the box"),
        ('{"target": "b.jpg", "parts": ["c.jpg"], "boxes": [[-1, 2, 3, 4]]}', "has the box"),
        ('{"target": "b.jpg", "parts": ["c.jpg"], "boxes": [[0, 0, 1, true]]}', "has the box"),
        ('{"target": "b.jpg", "parts": ["c.jpg"], "boxes": [[0, 0, 1, 1e999]]}', "has the box"),
        ('{"target": "b.jpg", "parts": ["c.jpg"], "boxes": [[0, 0, 1, NaN]]}', "holds NaN"),
        (f'{{"target": "b.jpg", "parts": ["c.jpg"], "boxes": [[0, 0, 1, {10**400}]]}}', "has the box"),
        ('{"target": "b.jpg", "set": 1}', "a name as 'set', got a number"),
        ('{"target": "b.jpg", "provenance": "x"}', "an object as 'provenance', got text"),
        (GOOD, "has the target of line 1 again"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: str | bytes, message: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(PitError, match=f"^Line 3 of 'parts.jsonl' .*{message}") as caught:
        _read(tmp_path, GOOD.encode() + b"\n\n" + raw)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_manifest_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(PitError, match="'parts.jsonl' is empty"):
        _read(tmp_path, content)


@pytest.mark.parametrize(
    ("wholes", "message"),
    [
        ([Whole("../a.jpg")], "Line 1 of 'm.jsonl' names a picture that may not be read"),
        ([Whole("a.jpg"), Whole("a.jpg")], "Line 2 of 'm.jsonl' has the target of line 1"),
        ([Whole("a.jpg", provenance={"score": float("nan")})], "what JSON cannot"),
        ([Whole("a.jpg", provenance={"made": Path("x")})], "what JSON cannot"),
        ([Whole("\udcff.jpg")], "what JSON cannot"),
        ([], "There is no whole to write into 'm.jsonl'"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    tmp_path: Path, wholes: list[Whole], message: str
) -> None:
    (tmp_path / "m.jsonl").write_text(GOOD)
    with pytest.raises(PitError, match=message):
        write_manifest(tmp_path / "m.jsonl", wholes)
    assert (tmp_path / "m.jsonl").read_text() == GOOD
