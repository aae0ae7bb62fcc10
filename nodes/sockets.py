"""The pack's socket types, and the parts of a node's schema that all nodes share."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

CATEGORY = "Piece it Together"
ALIASES = ["piece it together", "pit"]  # find every node

IPTokensSocket = io.Custom("PIT_IP_TOKENS")
IPAdapterSocket = io.Custom("PIT_IP_ADAPTER")
IPPriorSocket = io.Custom("PIT_IP_PRIOR")
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
