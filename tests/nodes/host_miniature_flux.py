"""Runs in ComfyUI: the cases of test_miniature_flux_in_comfyui.py. Argument: the folder with its files."""

import sys
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import benches  # noqa: E402

bench = benches.RealBench(Path.cwd(), FOLDER / "host")

import torch  # noqa: E402

import nodes as host_nodes  # noqa: E402

files = bench.part("pit_core.files")
given, metadata = files.load_tensors(FOLDER / "inputs.safetensors")
results = {}
with torch.inference_mode():
    model, clip, vae = bench.part("nodes.miniature").load_miniature_flux(FOLDER / "weights")
    text = host_nodes.CLIPTextEncode().encode(clip, metadata["prompt"])[0]
    results["text"], results["pooled"] = text[0][0], text[0][1]["pooled_output"]
    results["encoded"], results["decoded"] = vae.encode(given["canvas"]), vae.decode(given["latents"])
    guided = [[text[0][0], {**text[0][1], "guidance": 30.0}]]
    positive, negative, latent = host_nodes.InpaintModelConditioning().encode(
        guided, guided, given["canvas"], vae, given["mask"], noise_mask=False
    )

    base = model.model
    told = {key: value for key, value in positive[0][1].items() if key != "pooled_output"}
    conds = base.extra_conds(
        noise=given["noise"],
        device=torch.device("cpu"),
        cross_attn=positive[0][0],
        pooled_output=results["pooled"],
        **told,
    )
    inputs = {name: cond.cond for name, cond in conds.items()}
    context = inputs.pop("c_crossattn")
    denoised = base.apply_model(
        given["noise"], given["times"], c_concat=inputs.pop("c_concat"), c_crossattn=context, **inputs
    )
    results["predicted"] = (given["noise"] - denoised) / given["times"]
    sampled = host_nodes.KSampler().sample(
        model, 5, 4, 1.0, "euler", "simple", positive, negative, {"samples": torch.zeros_like(given["noise"])}
    )
    results["sampled"] = sampled[0]["samples"]
    again, arguments = model.cached_patcher_init
    other = again(*arguments, disable_dynamic=True).model.diffusion_model.img_in.weight
    assert torch.equal(other, base.diffusion_model.img_in.weight)
files.save_tensors(FOLDER / "results.safetensors", {k: v.float().contiguous() for k, v in results.items()})
