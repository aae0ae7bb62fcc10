"""Directions as a run takes them: files and steps, read once, kept in its record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import PitError
from ..ip_adapter.adapter import IPAdapter
from ..runs import file_entry, recorded_file
from .checkpoint import load_direction
from .direction import fit_notes, notes
from .edit import Move, check_shape, shifted
from .text import parse_move


@dataclass(frozen=True, eq=False)
class Moves:
    """Directions with their files and steps. orthogonal: set at right angles to each other first."""

    files: tuple[Path, ...] = ()
    moves: tuple[Move, ...] = ()
    orthogonal: bool = False

    def for_tokens(self) -> Moves:
        """These, if a prior's tokens can be moved along them. Raises PitError for those in CLIP features."""
        for direction, _ in self.moves:
            if direction.space != "tokens":
                raise PitError(
                    f"'{direction.title}' is a direction in CLIP features, but the prior makes tokens; find "
                    "it in tokens."
                )
        return self

    def edit(self, adapter: IPAdapter) -> Callable[[Tensor], Tensor] | None:
        """What they do to a prior's tokens (B, T, D); None if there are none of them.

        Raises PitError for directions in CLIP features, and for such as do not fit the adapter's tokens.
        """
        shape = (adapter.num_tokens, adapter.cross_attention_dim)
        for direction, _ in self.for_tokens().moves:
            check_shape(direction, *shape)
        if not self.moves:
            return None
        shift = shifted(self.moves, shape, orthogonal=self.orthogonal)
        return lambda tokens: tokens + shift.to(tokens)

    def notes(self, adapter: IPAdapter) -> list[str]:
        """What the user should know of them, one sentence each."""
        said = [
            (each.title, note)
            for each, _ in self.moves
            for note in (*notes(each), *fit_notes(each, adapter.content_hash))
        ]
        return [f"{title}: {note}" for title, note in said]

    def entry(self, base: Path) -> dict[str, Any]:
        """For the settings of a record; nothing where there are no directions."""
        if not self.moves:
            return {}
        steps = [step for _, step in self.moves]
        files = [{**file_entry(p, base), "step": s} for p, s in zip(self.files, steps, strict=True)]
        return {"directions": files, "orthogonal": self.orthogonal}


def read_moves(named: Sequence[str], orthogonal: bool = False) -> Moves:
    """The directions of "FILE:0.8" and so on. Raises PitError as parse_move and load_direction do."""
    return _read([parse_move(each) for each in named], orthogonal)


def recorded_moves(settings: Mapping[str, Any], record: Path) -> Moves:
    """Those of a record's settings. Raises PitError for files that are gone or have changed, and KeyError and
    its like for damaged entries."""
    entries = settings.get("directions", [])
    files = [(recorded_file(entry, record), float(entry["step"])) for entry in entries]
    return _read(files, bool(settings.get("orthogonal", False)))


def _read(files: Sequence[tuple[Path, float]], orthogonal: bool) -> Moves:
    moves = tuple((load_direction(path), step) for path, step in files)
    return Moves(tuple(path for path, _ in files), moves, orthogonal)
