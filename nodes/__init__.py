"""The ComfyUI nodes: thin files, one per method, that read sockets, call `pit_core` and return the result."""

NODE_CLASS_MAPPINGS: dict[str, type] = {}
