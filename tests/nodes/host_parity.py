"""Runs in ComfyUI: the cases of test_parity_with_diffusers.py. Argument: the folder with its files."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

FOLDER = Path(sys.argv[1])
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import benches  # noqa: E402

bench = benches.RealBench(Path.cwd(), FOLDER / "host")

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import core_models  # noqa: E402
import torch  # noqa: E402

files = bench.part("pit_core.files")
given, _ = files.load_tensors(FOLDER / "inputs.safetensors")
cases = json.loads((FOLDER / "cases.json").read_text("utf-8"))
make = bench.part("pit_core.ip_adapter.tokens").IPTokens


def weights_of(name: str) -> dict[str, torch.Tensor]:
    return files.load_tensors(FOLDER / f"{name}.safetensors")[0]


def sd15() -> Any:
    model, names = core_models.sd15(bench.host, benches.SD15)
    weights = {names[key]: value for key, value in weights_of("sd15").items()}
    bench.host._fill(model.model.diffusion_model, weights, "SD1.5")
    return model


def applied(model: Any, adapter: str = "a", masked: bool = False, **settings: Any) -> Any:
    tokens = make(
        given[f"{adapter}_tokens"], given[f"{adapter}_null"].shape[1], null=given[f"{adapter}_null"]
    )
    mask = given["mask"] if masked else None
    inputs = {"model": model, "ip_adapter": adapters[adapter], "tokens": tokens, "mask": mask}
    return bench.first("PiTApplyTokens", **inputs, **settings)


def sampled(base: str, settings: dict[str, Any]) -> torch.Tensor:
    model, family = bases[base], "sd15" if base == "sd15" else "sdxl"
    if settings.get("lora"):
        model = core_models.with_lora(model, weights_of("lora"))
    for each in settings.get("apply", []):
        model = applied(model, **each)
    extras = {half: {"pooled_output": given[f"{half}_pooled"]} for half in ("cond", "uncond")}
    conds = [
        [[given[f"{family}_{half}"], extras[half] if family == "sdxl" else {}]] for half in ("cond", "uncond")
    ]
    if settings.get("control"):
        conds = core_models.controlled(conds, control, given["hint"], 0.5)
    first = settings.get("first", 0)
    latent = given["latent"] if first else torch.zeros_like(given["noise"])
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model,
            given["noise"],
            settings.get("cfg", 4.0),
            comfy.samplers.sampler_object("euler"),
            given["sigmas"][first:],
            *conds,
            latent,
            noise_mask=given["noise_mask"] if settings.get("inpaint") else None,
            disable_pbar=True,
        )


bases = {name: bench.host.build_sdxl(benches.UNET, partial(weights_of, name)) for name in ("sdxl", "tuned")}
bases["sd15"] = sd15()
control = core_models.controlnet(bench.host, benches.UNET)
control.control_model.load_state_dict(
    core_models.control_names(bench.host, benches.UNET, weights_of("control"))
)
adapters = {}
for name in ("a", "b", "plus", "base"):
    shutil.copy(FOLDER / f"{name}.safetensors", FOLDER / "host/models/ipadapter")
    adapters[name] = bench.first("PiTLoadIPAdapter", file=f"{name}.safetensors")
results = {name: sampled(case.get("on", "sdxl"), case) for name, case in cases.items()}
files.save_tensors(FOLDER / "results.safetensors", results)
