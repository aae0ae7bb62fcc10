"""Encoders for the tests on Ray, whose processes import them from here."""

import os
import signal
import time
from pathlib import Path

import tiny_parts
import torch
from torch import Tensor

from pit_core.parts.embed import Encoder


class Watched(Encoder):
    """Notes each shard that it has encoded as a line in `log`, after a pause."""

    log: Path
    pause = 0.0

    def __call__(self, pixels: Tensor) -> Tensor:
        tokens = super().__call__(pixels)
        time.sleep(self.pause)
        with self.log.open("a") as file:
            file.write(f"{len(pixels)}\n")
        return tokens


class Dying(Watched):
    """Its process is killed at the second shard, once."""

    def __call__(self, pixels: Tensor) -> Tensor:
        mark = self.log.with_name("killed")
        if self.log.exists() and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(pixels)


def load(kind: type[Watched], log: Path, pause: float = 0.0) -> Watched:
    torch.set_num_threads(1)
    encode = kind(tiny_parts.image_encoder(), tiny_parts.adapter())
    encode.log, encode.pause = log, pause
    return encode
