"""Folders of parts told by their file names."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pit_core.errors import PitError
from pit_core.parts.layouts import Layout, import_folder
from pit_core.parts.manifest import read_manifest, write_manifest


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def _found(root: Path, layout: Layout = "auto") -> tuple[dict[str, tuple[str, ...]], list[str]]:
    wholes, skipped = import_folder(root, layout)
    return {whole.target: whole.parts for whole in wholes}, [item.file for item in skipped]


def test_the_released_layout(tmp_path: Path) -> None:
    names = ["elf/0_a.jpg", *(f"elf/0_a_{i}.jpg" for i in (0, 1, 2, 10)), "elf/0_b.png", "owl/elf_7.jpg"]
    _folder(tmp_path, *names, "owl/elf_7_0.jpg", "elf/notes.txt", ".cache/0_a.jpg")
    targets, skipped = _found(tmp_path)
    assert targets == {
        "elf/0_a.jpg": ("elf/0_a_0.jpg", "elf/0_a_1.jpg", "elf/0_a_2.jpg", "elf/0_a_10.jpg"),
        "elf/0_b.png": (),
        "owl/elf_7.jpg": ("owl/elf_7_0.jpg",),
    }
    assert skipped == []
    wholes, _ = import_folder(tmp_path)
    assert [whole.set for whole in wholes] == ["elf", "elf", "owl"]
    assert {whole.provenance["layout"] for whole in wholes} == {"released"}


def test_the_readme_layout(tmp_path: Path) -> None:
    _folder(tmp_path, "dragon.jpg", "dragon_1.jpg", "dragon_0.png", "green_cat.jpg", "green_cat_0.jpg")
    targets, skipped = _found(tmp_path)
    assert targets == {
        "dragon.jpg": ("dragon_0.png", "dragon_1.jpg"),
        "green_cat.jpg": ("green_cat_0.jpg",),
    }
    assert skipped == []
    assert {whole.set for whole in import_folder(tmp_path)[0]} == {tmp_path.name}


def test_names_that_the_reference_code_loses_are_targets(tmp_path: Path) -> None:
    _folder(tmp_path, "dragon.jpg", "my_big_dragon.jpg", "my_big_dragon_0.jpg", "my_big.jpg")
    assert _found(tmp_path)[0] == {
        "dragon.jpg": (),
        "my_big.jpg": (),
        "my_big_dragon.jpg": ("my_big_dragon_0.jpg",),
    }


def test_each_folder_has_its_own_layout_unless_one_is_given(tmp_path: Path) -> None:
    _folder(tmp_path, "x/cat.jpg", "x/cat_0.jpg", "y/cat_0.jpg", "y/cat_0_0.jpg")
    assert _found(tmp_path) == ({"x/cat.jpg": ("x/cat_0.jpg",), "y/cat_0.jpg": ("y/cat_0_0.jpg",)}, [])
    assert _found(tmp_path, "released")[0].keys() == {"x/cat.jpg", "x/cat_0.jpg", "y/cat_0.jpg"}
    assert _found(tmp_path, "readme")[0].keys() == {"x/cat.jpg"}


def test_parts_without_a_target_are_reported_and_never_made_targets(tmp_path: Path) -> None:
    _folder(tmp_path, "a/x_y.jpg", "a/x_z_0.jpg", "b/cat.jpg", "b/cat_0.jpg", "b/cat_0_1.jpg", "b/dog_0.jpg")
    targets, skipped = _found(tmp_path)
    assert targets == {"a/x_y.jpg": (), "b/cat.jpg": ("b/cat_0.jpg",)}
    assert skipped == ["a/x_z_0.jpg", "b/cat_0_1.jpg", "b/dog_0.jpg"]


def test_files_that_a_manifest_cannot_name_are_reported(tmp_path: Path) -> None:
    _folder(tmp_path, "a.jpg", "a.png", "b:c.jpg", "con.jpg", "d/e.jpg")
    (tmp_path / "d" / "out.jpg").symlink_to(Path(__file__).resolve())
    wholes, skipped = import_folder(tmp_path)
    assert [whole.target for whole in wholes] == ["a.jpg", "d/e.jpg"]
    assert [item.file for item in skipped] == ["a.png", "b:c.jpg", "con.jpg", "d/out.jpg"]
    assert "'a.jpg'" in skipped[0].reason
    write_manifest(tmp_path / "parts.jsonl", wholes)
    assert read_manifest(tmp_path / "parts.jsonl") == wholes


@contextmanager
def _not_as_root() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name == "nt", reason="permissions are not those of Windows")
@pytest.mark.parametrize("mode", [0o000, 0o444])  # it cannot be listed, or its files not looked at
def test_a_subfolder_that_cannot_be_read_is_reported_and_left_out(mode: int) -> None:
    with tempfile.TemporaryDirectory() as name:  # the folders above pytest's own are for root alone
        root = _folder(Path(name), "a/x_y.jpg", "b/x_y.jpg", "c/x_y.jpg")
        root.chmod(0o755)
        (root / "b").chmod(mode)
        try:
            with _not_as_root():
                targets, skipped = _found(root)
                reason = import_folder(root)[1][0].reason
                with pytest.raises(PitError, match=r"^'[^\n]*b' cannot be read \(Permission denied\)"):
                    import_folder(root / "b")
        finally:
            (root / "b").chmod(0o755)
    assert list(targets) == ["a/x_y.jpg", "c/x_y.jpg"]
    assert skipped == ["b"]
    assert "cannot be read (Permission denied); change its permissions" in reason


def test_a_folder_without_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PitError, match="There is no folder"):
        import_folder(tmp_path / "none")
    with pytest.raises(PitError, match="holds no target"):
        import_folder(_folder(tmp_path, "a_b_0.jpg"))
    with pytest.raises(PitError, match="layout"):
        import_folder(tmp_path, "other")  # type: ignore[arg-type]
