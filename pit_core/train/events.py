"""A run's log as events for tensorboard."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from ..files import write_text_atomic

READ = "read.json"


class EventLog:
    """Hands the lines of a log.jsonl over to tensorboard, each once, also over several runs.

    Where tensorboard is not installed it says so once and does nothing.
    """

    def __init__(self, log: Path, folder: Path) -> None:
        self.log, self.folder = log, folder
        self._warned = False

    def update(self) -> None:
        """Write events for what the log has gained; a line that is still being written waits."""
        start = self._read()
        new = self.log.read_bytes()[start:] if self.log.is_file() else b""
        whole = new[: new.rfind(b"\n") + 1]
        if not whole:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            if not self._warned:
                warnings.warn("tensorboard is not installed, so no events are written for it.", stacklevel=2)
            self._warned = True
            return
        with SummaryWriter(str(self.folder)) as writer:
            for line in whole.splitlines():
                _write(writer, line)
        write_text_atomic(self.folder / READ, json.dumps({"bytes": start + len(whole)}))

    def _read(self) -> int:
        """How much of the log has been handed over; what is not readable is handed over again."""
        try:
            return int(json.loads((self.folder / READ).read_text(encoding="utf-8"))["bytes"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def _write(writer: object, line: bytes) -> None:
    try:
        values = json.loads(line)
        step = int(values.pop("step"))
    except (ValueError, KeyError):  # a line that a power cut has torn
        return
    for name, value in values.items():
        if name != "saved":
            writer.add_scalar(name.replace("val_", "val/t"), value, step)  # type: ignore[attr-defined]
