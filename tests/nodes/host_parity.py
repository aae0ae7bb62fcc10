"""Runs in ComfyUI: the cases of test_parity_with_diffusers.py. Argument: the folder with its files."""

import json
import sys
from functools import partial
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import benches  # noqa: E402

bench = benches.RealBench(Path.cwd(), FOLDER / "host")

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import torch  # noqa: E402

files = bench.part("pit_core.files")
given, _ = files.load_tensors(FOLDER / "inputs.safetensors")
cases = json.loads((FOLDER / "cases.json").read_text("utf-8"))
model = bench.host.build_sdxl(
    json.loads((FOLDER / "unet.json").read_text("utf-8")),
    partial(lambda path: files.load_tensors(path)[0], FOLDER / "unet.safetensors"),
)
(FOLDER / "host/models/ipadapter/a.safetensors").write_bytes((FOLDER / "adapter.safetensors").read_bytes())
adapter = bench.first("PiTLoadIPAdapter", file="a.safetensors")
make = bench.part("pit_core.ip_adapter.tokens").IPTokens
tokens = make(given["tokens"], given["null"].shape[1], null=given["null"])

pooled = {half: {"pooled_output": given[f"{half}_pooled"]} for half in ("cond", "uncond")}
positive, negative = ([[given[half], pooled[half]]] for half in ("cond", "uncond"))
results = {}
for name, settings in cases.items():
    settings = dict(settings)
    cfg = settings.pop("cfg", 4.0)
    mask = given["mask"] if settings.pop("masked", False) else None
    patched = model
    if settings:
        patched = bench.first(
            "PiTApplyTokens", model=model, ip_adapter=adapter, tokens=tokens, mask=mask, **settings
        )
    with torch.inference_mode():
        results[name] = comfy.sample.sample_custom(
            patched,
            given["noise"],
            cfg,
            comfy.samplers.sampler_object("euler"),
            given["sigmas"],
            positive,
            negative,
            torch.zeros_like(given["noise"]),
            disable_pbar=True,
        )
files.save_tensors(FOLDER / "results.safetensors", results)
