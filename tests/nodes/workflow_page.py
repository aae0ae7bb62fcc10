"""ComfyUI's page in a headless Chromium: what loads a workflow as an artist's browser does."""

from __future__ import annotations

import json
import os
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.0.0",
    "Comfy.Validation.Workflows": True,
    "Comfy.Notification.ShowVersionUpdates": False,
}
SILENT = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


class Page:
    """The page of one server. said: what its console has said so far."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.address = address
        self.said: list[str] = []
        self.vue = False
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))

    def open(self, *, vue: bool) -> None:
        """Load the page with the one or the other renderer of nodes."""
        settings = json.dumps({**SETTINGS, "Comfy.VueNodes.Enabled": vue}).encode()
        request = urllib.request.Request(self.address + "/settings", settings, method="POST")
        urllib.request.urlopen(request, timeout=30).close()
        self.vue = vue
        self.said.clear()
        self.page.goto(self.address, wait_until="domcontentloaded")
        self.page.wait_for_function("window.app?.extensionManager && window.app.graph", timeout=120_000)
        self.page.wait_for_timeout(2000)

    def run(self, script: str, *arguments: Any) -> Any:
        """A JavaScript function of the arguments, in the page."""
        return self.page.evaluate(f"(given) => ({script})(...given)", list(arguments))

    def load(self, workflow: dict[str, Any], name: str) -> None:
        self.run("(w, name) => app.loadGraphData(w, true, true, name)", workflow, name)
        self.page.wait_for_timeout(1500)

    def prompt(self) -> dict[str, Any]:
        """What the page would send to the server for the graph that is loaded."""
        nodes = self.run("async () => (await app.graphToPrompt()).output")
        return {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in nodes.items()}

    def text(self) -> str:
        return self.page.inner_text("body")


@contextmanager
def opened(address: str) -> Iterator[Page]:
    """Skips the test, and says why, without playwright or a Chromium (CHROMIUM_PATH)."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e .[browser]")
    named = [os.environ.get("CHROMIUM_PATH"), *map(shutil.which, BROWSERS)]
    browser = next((path for path in named if path and Path(path).is_file()), None)
    if browser is None:
        pytest.skip("no Chromium: name its program in CHROMIUM_PATH")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=SILENT)
        try:
            yield Page(started.new_page(viewport={"width": 1920, "height": 1080}), address)
        finally:
            started.close()
