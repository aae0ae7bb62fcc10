"""Direction files: ours come back as they were, released tensors are read, others are refused."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pit_core.directions.checkpoint import load_direction, save_direction
from pit_core.directions.direction import Direction, Evidence, notes
from pit_core.directions.grid import sweep_grid
from pit_core.directions.picture import direction_picture, similarities
from pit_core.errors import PitError
from pit_core.files import load_tensors

EVIDENCE = Evidence((50, 40), "ridge", 0.1, 12.5, 40.0, accuracy=0.97, confirmed=0.8, spread=3.0)
MEAN = Evidence((1, 1), "mean", math.inf, 12.5, 40.0)


def direction(seed: int = 0, **options: Any) -> Direction:
    vector = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    return Direction(vector, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"names": ("thin", "wide"), "evidence": EVIDENCE, "adapter": "a" * 64, "encoder": "b" * 64},
        {"names": ('"quoted", [list]', "große Krähe"), "evidence": MEAN, "space": "clip"},
        {},
    ],
)
def test_a_direction_comes_back_as_it_was(tmp_path: Path, options: dict) -> None:
    path = tmp_path / "sub" / "wide.safetensors"
    save_direction(path, direction(**options), {"note": "mine"})
    found = load_direction(path)
    assert torch.equal(found.vector, direction().vector)
    for name in ("space", "names", "evidence", "adapter", "encoder"):
        assert getattr(found, name) == getattr(direction(**options), name)
    metadata = load_tensors(path)[1]
    assert metadata["kind"] == "direction" and metadata["note"] == "mine"
    assert float(metadata["norm"]) == pytest.approx(found.norm)


@pytest.mark.parametrize(
    ("tensor", "space", "shape"),
    [
        (torch.ones(16, 2048), "tokens", (16, 2048)),
        (torch.ones(1, 4, 768, dtype=torch.float16), "tokens", (4, 768)),
        (torch.nn.Parameter(torch.ones(16, 8)), "tokens", (16, 8)),
        (torch.ones(257, 1280), "clip", (257, 1280)),
        (torch.ones(1, 257, 1280), "clip", (257, 1280)),
        (torch.ones(1024), "clip", (1024,)),
        (torch.ones(1, 1024), "clip", (1024,)),
    ],
)
def test_released_bare_tensors(tmp_path: Path, tensor: torch.Tensor, space: str, shape: tuple) -> None:
    torch.save(tensor, tmp_path / "ip_direction.pt")
    found = load_direction(tmp_path / "ip_direction.pt")
    assert (found.space, tuple(found.vector.shape), found.vector.dtype) == (space, shape, torch.float32)
    assert found.title == "ip_direction"
    assert "does not say what it was found from" in notes(found)[0]


def test_a_bare_tensor_in_a_dict_or_as_safetensors(tmp_path: Path) -> None:
    torch.save({"anything": torch.ones(16, 8)}, tmp_path / "a.pt")
    save_file({"x": torch.ones(16, 8)}, tmp_path / "b.safetensors")
    for name in ("a.pt", "b.safetensors"):
        assert load_direction(tmp_path / name).vector.shape == (16, 8)
    assert load_direction(tmp_path / "a.pt", space="clip").space == "clip"


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_a_pickle_with_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), "ip_direction.pt")
    with pytest.raises(PitError, match="could run code"):
        load_direction("ip_direction.pt")
    assert not Path("evil").exists()


def own(**changes: Any) -> dict[str, str]:
    evidence = {"counts": [9, 9], "method": "mean", "ridge": None, "gap": 1, "length": 2}
    metadata = {"kind": "direction", "version": "1", "names": ["a", "b"], "evidence": evidence}
    metadata |= {key: value for key, value in changes.items() if key != "evidence"}
    metadata["evidence"] = {**evidence, **changes.get("evidence", {})}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"tokens": torch.ones(1, 4, 8)}, {"kind": "ip_tokens"}, "kind 'ip_tokens', not a direction"),
        ({"a": torch.ones(4, 8), "b": torch.ones(4, 8)}, {}, "holds 2 tensors"),
        ({"a": torch.ones(2, 4, 8)}, {}, "shape"),
        ({"a": torch.ones(())}, {}, "shape"),
        ({"a": torch.ones(4, 8, dtype=torch.int64)}, {}, "torch.int64"),
        ({"a": torch.full((4, 8), math.nan)}, {}, "NaN"),
        ({"a": torch.zeros(4, 8)}, {}, "zero everywhere"),
        ({"direction": torch.ones(4, 8)}, own(version="2"), "newer"),
        ({"direction": torch.ones(4, 8)}, own(version="x"), "newer"),
        ({"direction": torch.ones(4, 8)}, own(names="{"), "cannot be read"),
        ({"direction": torch.ones(4, 8)}, own(names=["a"]), "cannot be read"),
        ({"direction": torch.ones(4, 8)}, own(names=["a"] * 3), "cannot be read"),
        ({"direction": torch.ones(4, 8)}, own(evidence={"counts": [1]}), "cannot be read"),
        ({"direction": torch.ones(4, 8)}, own(evidence={"counts": "ab"}), "cannot be read"),
        ({"direction": torch.ones(4, 8)}, own(evidence={"gap": "x"}), "cannot be read"),
        ({"direction": torch.ones(4, 8)}, own(evidence={"gap": math.nan}), "makes no sense"),
        ({"direction": torch.ones(4, 8)}, own(evidence={"method": "luck"}), "makes no sense"),
        ({"direction": torch.ones(4, 8)}, own(space="pixels"), "tokens or clip"),
        ({"direction": torch.ones(4, 8), "x": torch.ones(1)}, own(), "is damaged"),
        ({"direction": torch.ones(8)}, own(), "has the shape"),
    ],
)
def test_files_that_are_no_direction(tmp_path: Path, tensors: dict, metadata: dict, words: str) -> None:
    save_file(tensors, tmp_path / "odd.safetensors", metadata=metadata)
    with pytest.raises(PitError, match=words) as error:
        load_direction(tmp_path / "odd.safetensors")
    assert str(error.value).startswith("'odd.safetensors'") and "\n" not in str(error.value)


def test_directions_are_saved_as_safetensors_alone(tmp_path: Path) -> None:
    with pytest.raises(PitError, match="name the file wide.safetensors"):
        save_direction(tmp_path / "wide.pt", direction())
    assert not list(tmp_path.iterdir())


# pictures


def test_a_grid_has_a_row_for_each_concept_and_a_column_for_each_step() -> None:
    pictures = [Image.new("RGB", (64, 64), (9 * i, 0, 0)) for i in range(10)]
    labels = ["step -1", "step 0", "step +1", "step +2", "step +3"]
    one, two = sweep_grid(pictures[:5], labels), sweep_grid(pictures, labels, "thin to wide")
    assert one.width == two.width > 5 * 192 and two.height > one.height + 192
    for wrong in (pictures[:4], []):
        with pytest.raises(PitError, match="a multiple"):
            sweep_grid(wrong, labels)
    with pytest.raises(PitError, match="a multiple"):
        sweep_grid(pictures, [])


def test_directions_can_be_looked_at_and_compared() -> None:
    several = [direction(0, names=("a", "b")), direction(1, names=("c", "d")), direction(0, space="clip")]
    assert direction_picture(several[:1]).height < direction_picture(several[:2]).height
    assert direction_picture([Direction(torch.ones(8), "clip")]).mode == "RGB"
    assert similarities(several) == [f"a to b and c to d: cosine {cosine(several):+.2f}"]
    with pytest.raises(PitError, match="different shapes"):
        direction_picture([several[0], Direction(torch.ones(2, 8))])


def cosine(several: list[Direction]) -> float:
    a, b = (each.vector.flatten() for each in several[:2])
    return float(torch.cosine_similarity(a, b, dim=0))
