"""A running ComfyUI with the pack and the files that the workflows name: to validate and to run them."""

from __future__ import annotations

import json
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import real_host
from test_end_to_end import Server
from workflow_graphs import FILES

FOLDER = real_host.ROOT / "workflows"
WEIGHTS = real_host.ROOT / "pit_core/miniature/weights"
NEEDED = (
    "unet/diffusion_pytorch_model.safetensors",
    "ip_adapter_plus.safetensors",
    "ip_prior.safetensors",
)


class WorkflowServer(Server):
    def place_files(self) -> None:
        """Empty files of all names that workflows mention: drop-downs list them, running them fails."""
        for name, file in FILES.items():
            path = self.folder / "models" / file.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def submit(self, graph: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """(number in the queue, what the server's validation has against the graph)."""
        data = json.dumps({"prompt": graph}).encode()
        try:
            with urllib.request.urlopen(self.address + "/prompt", data, timeout=30) as answer:
                told = json.load(answer)
                return told["prompt_id"], told["node_errors"]
        except urllib.error.HTTPError as error:
            return None, json.loads(error.read())

    def finished(self, number: str, seconds: int = 600) -> dict[str, Any]:
        """The history entry of what was submitted, when it has succeeded or failed."""
        for _ in range(2 * seconds):
            found = self.get(f"/history/{number}").get(number)
            if found and found["status"]["status_str"] in ("success", "error"):
                return found
            time.sleep(0.5)
        raise AssertionError("the graph did not finish")


@contextmanager
def serving(comfyui: Path, folder: Path) -> Iterator[WorkflowServer]:
    """A ComfyUI's server with folders of its own, stopped at the end."""
    server = WorkflowServer(comfyui, folder)
    try:
        shutil.copy(comfyui / "input/example.png", folder / "input/example.png")
        server.wait()
        yield server
    finally:
        server.stop()


def some_host() -> Path:
    """For what is made once. Ends the program, and says why, where there is no ComfyUI."""
    if not (found := real_host.folders()):
        sys.exit("There is no ComfyUI: name its folder in COMFYUI_PATH.")
    return found[0]


def missing_weights() -> str | None:
    """The first file that the miniature's graphs need and that is not there."""
    return next((name for name in NEEDED if not (WEIGHTS / name).is_file()), None)
