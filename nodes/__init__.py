"""The ComfyUI nodes: thin files, one per method, that read sockets, call `pit_core` and return the result."""

import logging

NODE_CLASS_MAPPINGS: dict[str, type] = {}

try:
    from comfy_api.latest import io

    _found = hasattr(io, "Autogrow")
except ImportError as error:
    if not (error.name or "").startswith("comfy_api"):
        raise
    _found = False

if _found:
    from .listing import NODES, host

    host.register_folders()
    NODE_CLASS_MAPPINGS.update({node.__name__: node for node in NODES})
else:
    logging.getLogger(__name__).warning("Piece it Together's nodes need ComfyUI 0.8 or newer.")
