"""The pack's socket types, what all nodes' schemas share, and errors that name an input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..pit_core.errors import PitError

CATEGORY = "Piece it Together"
ALIASES = ["piece it together", "pit"]  # find every node

IPTokensSocket = io.Custom("PIT_IP_TOKENS")
IPAdapterSocket = io.Custom("PIT_IP_ADAPTER")
IPPriorSocket = io.Custom("PIT_IP_PRIOR")
DirectionSocket = io.Custom("PIT_DIRECTION")
DiptychSocket = io.Custom("PIT_DIPTYCH_LAYOUT")
B4MSocket = io.Custom("PIT_B4M")
EmbedsSocket = io.Custom("EMBEDS")  # of the popular IP-Adapter pack: features before the projection

MINIATURE = "miniature (ships with this pack)"
_SCHEMA_FIELDS = {field.name for field in fields(io.Schema)}


def schema(node_id: str, name: str, description: str, aliases: list[str], **rest: Any) -> Any:
    """A node's schema; what an older host does not know of is left out.

    has_intermediate_output: a cached node shows its report again.
    """
    options = {"search_aliases": [*aliases, *ALIASES], **rest}
    known = {key: value for key, value in options.items() if key in _SCHEMA_FIELDS}
    return io.Schema(node_id=node_id, display_name=name, category=CATEGORY, description=description, **known)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """What is wrong in here is said of the input with this name."""
    try:
        yield
    except PitError as error:
        if str(error).startswith(name):
            raise
        raise PitError(f"{name}: {error}") from error
