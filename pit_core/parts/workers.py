"""Processes that make data ready beside the one that uses it."""

from __future__ import annotations

import signal


def leave_interrupts_to_the_parent(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: a terminal sends Ctrl-C to the workers as well, and without them the
    parent could not end its last step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
