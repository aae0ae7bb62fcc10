"""A running ComfyUI server with the pack installed: graphs go in by POST /prompt, files come out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import benches
import numpy as np
import pytest
import real_host
import torch
from PIL import Image

pytestmark = [pytest.mark.host, pytest.mark.slow, pytest.mark.timeout(900)]

WEIGHTS = real_host.ROOT / "pit_core/miniature/weights"
PARTS = real_host.ROOT / "pit_core/miniature/parts"
KINDS = ("wings", "ears")  # the parts of the main job


class Server:
    def __init__(self, comfyui: Path, folder: Path) -> None:
        python = real_host.interpreter(comfyui)
        self.folder = folder
        for name in ("custom_nodes", "input", "output/ip_tokens", "models/ipadapter", "models/ip_prior"):
            (folder / name).mkdir(parents=True)
        (folder / "custom_nodes" / "piece-it-together").symlink_to(real_host.ROOT, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        options = ["--cpu", "--listen", "127.0.0.1", "--port", str(port), "--base-directory", str(folder)]
        options += ["--disable-api-nodes", "--disable-auto-launch", "--database-url", "sqlite:///:memory:"]
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            [str(python), "main.py", *options],
            cwd=comfyui,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def wait(self, seconds: int = 300) -> None:
        for _ in range(seconds):
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-4000:]
            try:
                self.get("/system_stats")
                return
            except urllib.error.URLError:
                time.sleep(1)
        raise AssertionError("the server did not start: " + (self.folder / "server.log").read_text()[-4000:])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=30) as answer:
            return json.load(answer)

    def run(self, graph: dict[str, Any], seconds: int = 300) -> dict[str, Any]:
        """The history entry of a graph, finished or failed."""
        return self.finished(self.queue(graph), seconds)

    def queue(self, graph: dict[str, Any]) -> str:
        """The number that the server gives a graph."""
        data = json.dumps({"prompt": graph}).encode()
        try:
            with urllib.request.urlopen(self.address + "/prompt", data, timeout=30) as answer:
                return json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error

    def interrupt(self) -> None:
        request = urllib.request.Request(self.address + "/interrupt", b"", method="POST")
        urllib.request.urlopen(request, timeout=30).close()

    def finished(self, number: str, seconds: int = 300) -> dict[str, Any]:
        for _ in range(2 * seconds):
            found = self.get(f"/history/{number}")
            if number in found and found[number]["status"]["status_str"] in ("success", "error"):
                return found[number]
            time.sleep(0.5)
        raise AssertionError("the graph did not finish")

    def pictures(self, entry: dict[str, Any], node: str) -> list[np.ndarray]:
        """What a node saved, (H, W, 3) in 0-255 each."""
        places = [
            self.folder / each["type"] / each["subfolder"] / each["filename"]
            for each in entry["outputs"][node]["images"]
        ]
        return [np.asarray(Image.open(place).convert("RGB"), dtype=np.float32) for place in places]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture(scope="module")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(comfyui, tmp_path_factory.mktemp("base"))
    try:
        made.wait()
        yield made
    finally:
        made.stop()


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def error_of(entry: dict[str, Any]) -> str:
    assert entry["status"]["status_str"] == "error", entry
    return next(
        data["exception_message"] for kind, data in entry["status"]["messages"] if kind == "execution_error"
    )


def succeeded(entry: dict[str, Any]) -> bool:
    assert entry["status"]["status_str"] == "success", entry["status"]
    return True


def look_like_pictures(found: list[np.ndarray]) -> bool:
    """None is blank, and no two are alike."""
    assert min(float(each.std(axis=(0, 1)).max()) for each in found) > 10
    assert all(float(abs(a - b).mean()) > 1 for a, b in combinations(found, 2))
    return True


def cached(entry: dict[str, Any]) -> set[str]:
    """The nodes that did not have to run."""
    return {
        number
        for kind, data in entry["status"]["messages"]
        if kind == "execution_cached"
        for number in data["nodes"]
    }


def test_the_nodes_are_listed(server: Server) -> None:
    ours = {name: info for name, info in server.get("/object_info").items() if name.startswith("PiT")}
    assert ours.keys() == {page.stem for page in (real_host.ROOT / "js/docs").glob("*.md")}
    assert {info["category"] for info in ours.values()} == {"Piece it Together"}


def test_tokens_are_combined_saved_and_shown(server: Server) -> None:
    from pit_core.ip_adapter.tokens import IPTokens, load_ip_tokens, save_ip_tokens

    for seed in (1, 2):
        made = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(seed))
        save_ip_tokens(server.folder / f"output/ip_tokens/in_{seed}.safetensors", IPTokens(made, 4))
    graph = {
        "1": node("PiTLoadTokens", file="in_1.safetensors"),
        "2": node("PiTLoadTokens", file="in_2.safetensors"),
        "3": node(
            "PiTCombineTokens",
            operation="concat",
            amount=0.5,
            **{"tokens.tokens0": ["1", 0], "tokens.tokens1": ["2", 0]},
        ),
        "4": node("PiTSaveTokens", tokens=["3", 0], filename_prefix="both"),
        "5": node("PiTPreviewTokens", tokens=["3", 0]),
    }
    entry = server.run(graph)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert load_ip_tokens(server.folder / "output/ip_tokens/both_00001_.safetensors").tokens.shape == (
        1,
        8,
        32,
    )
    assert entry["outputs"]["5"]["images"]


def shown_tokens(server: Server, name: str = "next.safetensors", seed: int = 0) -> dict[str, Any]:
    """A graph that reads a token file, which is written first."""
    from pit_core.ip_adapter.tokens import IPTokens, save_ip_tokens

    made = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(seed))
    save_ip_tokens(server.folder / "output/ip_tokens" / name, IPTokens(made, 4))
    return {"1": node("PiTLoadTokens", file=name), "2": node("PiTPreviewTokens", tokens=["1", 0])}


def test_a_bad_file_is_one_sentence_and_the_next_run_is_fine(server: Server) -> None:
    bad = server.folder / "models/ipadapter/bad.safetensors"
    bad.write_bytes(b"<!doctype html><html></html>")
    graph = {
        "1": node("PiTLoadIPAdapter", file="bad.safetensors"),
        "2": node("PreviewAny", source=["1", 1]),
    }
    assert "is a web page, not weights" in error_of(server.run(graph))
    assert succeeded(server.run(shown_tokens(server)))


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(server: Server) -> None:
    graph = shown_tokens(server, "changed.safetensors", seed=1)
    first = [server.queue(graph), server.queue(graph)]  # twice before the first is done
    entries = [server.finished(number) for number in first]
    assert all(map(succeeded, entries)) and "1" not in cached(entries[0]) and "1" in cached(entries[1])
    assert succeeded(again := server.run(shown_tokens(server, "changed.safetensors", seed=2)))
    assert "1" not in cached(again)


@pytest.fixture(scope="module")
def untrained(server: Server) -> str:
    """The name of an adapter and a prior for the miniature, of random weights: fine for all but looks."""
    from pit_core.files import load_tensors
    from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
    from pit_core.ip_adapter.checkpoint import save_ip_adapter
    from pit_core.ip_adapter.layers import layers_of_config
    from pit_core.ip_adapter.resampler import Resampler
    from pit_core.ip_prior.checkpoint import save_prior
    from pit_core.ip_prior.info import PriorInfo
    from pit_core.ip_prior.model import IPPrior

    skip_without("unet/diffusion_pytorch_model.safetensors", "image_encoder.safetensors")
    name = "untrained.safetensors"
    layers = layers_of_config(json.loads((WEIGHTS / "unet/config.json").read_text("utf-8")))
    encoder, _ = load_tensors(WEIGHTS / "image_encoder.safetensors")
    seen, width = encoder["vision_model.post_layernorm.weight"].shape[0], layers[0].context
    projector = Resampler(64, 1, 64, 1, 4, seen, width)
    made = benches.fill(IPAdapter(projector, IPLayers([layer.width for layer in layers], width)))
    save_ip_adapter(server.folder / "models/ipadapter" / name, made)
    prior = benches.fill(IPPrior(width, 64, 1, 1, 4))
    save_prior(server.folder / "models/ip_prior" / name, prior, PriorInfo(prior.config))
    return name


def skip_without(*names: str) -> None:
    if missing := [name for name in names if not (WEIGHTS / name).is_file()]:
        pytest.skip(f"the miniature has not been trained here: {missing[0]} is missing")


def main_job(server: Server, file: str, seed: int = 7, **settings: Any) -> dict[str, Any]:
    """Parts as files in, pictures of concepts out, by an adapter and a prior of that name."""
    parts = [sorted((PARTS / kind).glob("*.png"))[0] for kind in KINDS]
    for number, part in enumerate(parts):
        if not (path := server.folder / f"input/part{number}.png").is_file():
            path.write_bytes(part.read_bytes())
    prior = {"count": 2, "steps": 5, "guidance": 2.0, "solver": "euler", "seed": 7, "strength": 1.0}
    apply = {
        "weight": 1.0,
        "start_at": 0.0,
        "end_at": 1.0,
        "schedule": "even",
        "layer_map": "",
        "composition_weight": 1.0,
        "embeds_scaling": "V only",
        "uncond": "null or negative",
        "rows": "pictures",
    }
    sampler = {"steps": 8, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    prior, apply, sampler = (
        {**each, **settings.get(name, {})}
        for name, each in (("prior", prior), ("apply", apply), ("sampler", sampler))
    )
    return {
        "1": node("PiTMiniatureSDXL"),
        "2": node("PiTLoadIPAdapter", file=file),
        "3": node("PiTLoadPrior", file=file),
        "4": node("LoadImage", image="part0.png"),
        "5": node("LoadImage", image="part1.png"),
        "6": node(
            "PiTEncodeParts",
            ip_adapter=["2", 0],
            clip_vision=["1", 3],
            as_sketch=False,
            **{"parts.part0": ["4", 0], "parts.part1": ["5", 0]},
        ),
        "7": node("PiTSamplePrior", prior=["3", 0], parts=["6", 0], **prior),
        "8": node("PiTApplyTokens", model=["1", 0], ip_adapter=["2", 0], tokens=["7", 0], **apply),
        "9": node("CLIPTextEncode", clip=["1", 1], text="a critter"),
        "10": node("CLIPTextEncode", clip=["1", 1], text=""),
        "11": node("EmptyLatentImage", width=128, height=128, batch_size=2),
        "12": node(
            "KSampler",
            model=["8", 0],
            positive=["9", 0],
            negative=["10", 0],
            latent_image=["11", 0],
            seed=seed,
            **sampler,
        ),
        "13": node("VAEDecode", samples=["12", 0], vae=["1", 2]),
        "14": node("SaveImage", images=["13", 0], filename_prefix="concept"),
    }


def test_the_main_job_in_the_miniature(server: Server) -> None:
    skip_without(
        "unet/diffusion_pytorch_model.safetensors", "ip_adapter_plus.safetensors", "ip_prior.safetensors"
    )
    before = set((server.folder / "output").glob("concept_*.png"))
    entry = server.run(main_job(server, "miniature (ships with this pack)"))
    assert succeeded(entry)
    assert len(set((server.folder / "output").glob("concept_*.png")) - before) == 2
    found = server.pictures(entry, "14")
    assert look_like_pictures(found)
    plain = server.run(main_job(server, "miniature (ships with this pack)", apply={"weight": 0.0}))
    assert succeeded(plain)
    for picture, without in zip(found, server.pictures(plain, "14"), strict=True):
        assert look_like_pictures([picture, without])


def test_another_seed_of_the_sampler_makes_no_tokens_again(server: Server, untrained: str) -> None:
    pictures = len(list((server.folder / "output").glob("concept_*.png")))
    entry = server.run(main_job(server, untrained))
    assert succeeded(entry) and not cached(entry) & set("2678")
    assert len(list((server.folder / "output").glob("concept_*.png"))) == pictures + 2
    other = server.run(main_job(server, untrained, seed=8))
    assert succeeded(other) and cached(other) == {str(number) for number in range(1, 12)}
    same = server.run(main_job(server, untrained, seed=8))
    assert succeeded(same) and cached(same) >= {str(number) for number in range(1, 14)}


@pytest.mark.parametrize(
    "settings",
    [
        {"prior": {"steps": 1000, "count": 256, "solver": "heun"}},
        {"sampler": {"steps": 10_000}},
    ],
    ids=["prior", "sampler"],
)
def test_a_run_that_is_interrupted_stops_and_the_next_is_fine(
    server: Server, untrained: str, settings: dict[str, Any]
) -> None:
    graph = main_job(server, untrained, **settings)
    if "prior" in settings:  # its concepts alone: two hundred would not fit the batch
        graph = {number: graph[number] for number in "1234567"}
        graph["8"] = node("PiTPreviewTokens", tokens=["7", 0])
    number = server.queue(graph)
    time.sleep(6)
    server.interrupt()
    kinds = [kind for kind, _ in server.finished(number)["status"]["messages"]]
    assert "execution_interrupted" in kinds and "execution_error" not in kinds
    assert succeeded(server.run(main_job(server, untrained, seed=9)))


def test_not_a_number_gets_past_the_server_and_no_further(server: Server, untrained: str) -> None:
    """JSON has no NaN, but Python's reads it, and it is below no minimum."""
    nan = float("nan")
    for settings, words in (
        ({"apply": {"weight": nan}}, "weight to be a finite number"),
        ({"apply": {"end_at": nan}}, "start_at and end_at"),
        ({"prior": {"guidance": nan}}, "finite guidance"),
    ):
        assert words in error_of(server.run(main_job(server, untrained, **settings)))
    assert succeeded(server.run(main_job(server, untrained, seed=10)))
