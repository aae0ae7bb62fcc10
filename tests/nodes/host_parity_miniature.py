"""Runs in ComfyUI: the cases of test_parity_of_the_miniature.py. Argument: the folder with its files."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import benches  # noqa: E402

bench = benches.RealBench(Path.cwd(), FOLDER / "host")

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import torch  # noqa: E402

import nodes as host_nodes  # noqa: E402

files = bench.part("pit_core.files")
given, _ = files.load_tensors(FOLDER / "inputs.safetensors")
run = json.loads((FOLDER / "run.json").read_text("utf-8"))

shutil.copy(FOLDER / "adapter.safetensors", FOLDER / "host/models/ipadapter")
adapter = bench.first("PiTLoadIPAdapter", file="adapter.safetensors")
model, clip, _vae, clip_vision, *_ = bench.run("PiTMiniatureSDXL").args
tokens = bench.first("PiTEncodeImage", ip_adapter=adapter, clip_vision=clip_vision, image=given["picture"])
latent = {"samples": torch.zeros(run["shape"])}


def sampled(settings: dict[str, Any] | None) -> torch.Tensor:
    inputs = {"model": model, "ip_adapter": adapter, "tokens": tokens}
    used = model if settings is None else bench.first("PiTApplyTokens", **inputs, **settings)
    conds = [host_nodes.CLIPTextEncode().encode(clip, run[half])[0] for half in ("positive", "negative")]
    found = host_nodes.KSampler().sample(
        used, run["seed"], run["steps"], run["cfg"], run["sampler"], run["scheduler"], *conds, latent
    )
    return found[0]["samples"]


with torch.inference_mode():
    results = {name: sampled(settings) for name, settings in run["cases"].items()}
    sampler = comfy.samplers.KSampler(
        model, run["steps"], torch.device("cpu"), run["sampler"], run["scheduler"]
    )
    results["sigmas"] = sampler.sigmas
    results["noise"] = comfy.sample.prepare_noise(latent["samples"], run["seed"])
files.save_tensors(FOLDER / "results.safetensors", results)
