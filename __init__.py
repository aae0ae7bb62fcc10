"""Piece it Together for ComfyUI: what ComfyUI reads when it loads this folder as a custom node pack."""

from .nodes import NODE_CLASS_MAPPINGS

WEB_DIRECTORY = "./js"

__all__ = ["NODE_CLASS_MAPPINGS", "WEB_DIRECTORY"]
