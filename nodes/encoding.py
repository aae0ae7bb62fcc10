"""Pictures to IP tokens through the host's image encoder, each picture once.

Pictures and adapters are known by their content, an image encoder by its object: to hash its weights would
take longer than to encode most pictures. So one that the host has dropped and loaded again encodes again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..pit_core.ip_adapter.checkpoint import check_encoder
from ..pit_core.ip_adapter.encode import encode_tokens, null_tokens
from ..pit_core.ip_adapter.pixels import hash_pixels, preprocess
from . import host
from .sockets import naming

KEPT = 512  # pictures; 16 tokens of width 2048 are 128 KiB each
FULL_ENCODER, FULL_CANVAS = 224, 1024  # the released encoder, and the square that its parts were put on

Key = tuple[int, str, str]
"""The encoder's number, the adapter's hash, and the picture's, or the name of a null."""
_kept: OrderedDict[Key, Tensor] = OrderedDict()


class Encoding:
    """An image encoder and an adapter that belong together. Raises PitError where they do not."""

    def __init__(self, clip_vision: object, adapter: host.ManagedAdapter) -> None:
        self.encoder = host.HostEncoder(clip_vision)
        self.managed = adapter
        self.adapter = adapter.adapter
        with naming("clip_vision"):
            check_encoder(self.adapter, self.encoder.hidden_width, self.encoder.projection_dim)

    @property
    def canvas(self) -> int:
        """Side of the white square for parts: 1024 px, or what a smaller encoder sees."""
        return FULL_CANVAS if self.encoder.image_size >= FULL_ENCODER else self.encoder.image_size

    def pictures(self, pictures: Sequence[Image.Image], fit: str = "crop", chunk: int = 8) -> Tensor:
        """Pictures -> tokens (B, T, D), float32 on the CPU; at most `chunk` are encoded at a time."""
        size, mean, std = self.encoder.image_size, self.encoder.mean, self.encoder.std
        keys, missing = [], {}
        for picture in pictures:
            pixels = preprocess([picture], size, fit, mean=mean, std=std)
            keys.append((self.encoder.number, self.adapter.content_hash, hash_pixels(pixels)))
            if keys[-1] not in _kept:
                missing[keys[-1]] = pixels
        found = {key: _kept[key] for key in keys if key in _kept}
        _keep(found)
        if missing:
            found.update(self._encoded(missing, max(1, chunk)))
        return torch.stack([found[key] for key in keys])

    def _encoded(self, missing: dict[Key, Tensor], chunk: int) -> dict[Key, Tensor]:
        """Pixels by key -> tokens by key. What was done when the user stops is kept."""
        self.managed.projector.load()
        found: dict[Key, Tensor] = {}
        tell, keys = host.progress(len(missing)), list(missing)
        for start in range(0, len(keys), chunk):
            part = keys[start : start + chunk]
            pixels = torch.cat([missing[key] for key in part])
            rows = encode_tokens(self.encoder, self.adapter, pixels, chunk).cpu()
            found.update(zip(part, rows, strict=True))
            _keep({key: found[key] for key in part})
            tell(start + len(part))
        return found

    def null(self, kind: str | None) -> Tensor:
        """Tokens (1, T, D) of "no image"; None takes what the adapter was trained with."""
        kind = kind or ("grey" if self.adapter.kind == "plus" else "zeros")
        key = (self.encoder.number, self.adapter.content_hash, kind)
        if key not in _kept:
            self.managed.projector.load()
            _keep({key: null_tokens(self.encoder, self.adapter, kind)[0].cpu()})
        return _kept[key][None]


def _keep(found: dict[Key, Tensor]) -> None:
    for key, row in found.items():
        _kept[key] = row
        _kept.move_to_end(key)
    while len(_kept) > KEPT:
        _kept.popitem(last=False)
