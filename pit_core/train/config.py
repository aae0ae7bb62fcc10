"""A method's settings out of a YAML file: into one dataclass, with unknown names refused."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import PitError
from ..files import existing_file

T = TypeVar("T")


def read_config(path: str | os.PathLike[str], kind: type[T]) -> T:
    """The YAML file as a `kind`, a dataclass whose fields may be dataclasses.

    Values are checked against the fields' types: whole numbers, numbers (also 1e-4, which YAML takes for
    text), text, true/false, and paths, which are relative to the file's folder. Raises PitError for a file
    that is no YAML mapping, a name that is unknown (with the nearest known one), a value of another type,
    and a missing value.
    """
    path = existing_file(path)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = str(error).strip().splitlines()[0]
        raise PitError(f"'{path.name}' is not readable YAML ({first}).") from error
    return from_mapping(loaded, kind, where=f"'{path.name}'", folder=path.parent)


def from_mapping(values: Any, kind: type[T], *, where: str, folder: Path | None = None) -> T:
    """A mapping as a `kind`; `where` is what messages call it. Raises PitError as `read_config` does."""
    if not isinstance(values, Mapping):
        raise PitError(f"{where} should hold 'name: value' lines, got {type(values).__name__}.")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    _refuse_unknown(values, known, where)
    hints = typing.get_type_hints(kind)
    given = {
        name: _value(value, hints[name], f"'{name}' in {where}", folder or Path())
        for name, value in values.items()
    }
    missing = [name for name, field in known.items() if name not in given and _is_required(field)]
    if missing:
        raise PitError(f"{where} lacks {', '.join(missing)}.")
    return kind(**given)


def _refuse_unknown(values: Mapping[Any, Any], known: Mapping[str, Any], where: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}."
            raise PitError(f"{where} has the unknown setting '{name}'; {hint}")


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _value(value: Any, hint: Any, name: str, folder: Path) -> Any:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = _fitting(value, [part for part in typing.get_args(hint) if part is not type(None)])
    if is_dataclass(hint):
        return from_mapping(value, typing.cast(type, hint), where=name, folder=folder)
    if typing.get_origin(hint) is tuple:
        return _tuple(value, typing.get_args(hint), name, folder)
    return _plain(value, hint, name, folder)


def _fitting(value: Any, kinds: list[Any]) -> Any:
    """Of one kind or a list of it, what the value is."""
    several = isinstance(value, list)
    return next((kind for kind in kinds if (typing.get_origin(kind) is tuple) == several), kinds[0])


def _tuple(value: Any, kinds: tuple[Any, ...], name: str, folder: Path) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:
        if not isinstance(value, list):
            raise PitError(f"Expected {name} to be a list, got {value!r}.")
        return tuple(_value(v, kinds[0], f"entry {n} of {name}", folder) for n, v in enumerate(value, 1))
    if not isinstance(value, list) or len(value) != len(kinds):
        raise PitError(f"Expected {name} to be a list of {len(kinds)} values, got {value!r}.")
    return tuple(_value(v, kind, name, folder) for v, kind in zip(value, kinds, strict=True))


def _plain(value: Any, hint: type, name: str, folder: Path) -> Any:
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    elif hint is Path and isinstance(value, str) and value:
        return folder / Path(value).expanduser()
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    words = {float: "a number", int: "a whole number", Path: "a path", str: "text", bool: "true or false"}
    raise PitError(f"Expected {name} to be {words[hint]}, got {value!r}.")
