"""Runs in ComfyUI: the miniature through the host's own classes. Argument: the folder with its files."""

import sys
from pathlib import Path

FOLDER = Path(sys.argv[1])
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import benches  # noqa: E402

bench = benches.RealBench(Path.cwd(), FOLDER / "host")

import torch  # noqa: E402

files = bench.part("pit_core.files")
given, metadata = files.load_tensors(FOLDER / "inputs.safetensors")
miniature = bench.part("nodes.miniature")
results = {}
with torch.inference_mode():
    model, clip, vae, clip_vision = miniature.load_miniature(FOLDER / "weights")
    found = clip.encode_from_tokens(clip.tokenize(metadata["prompt"]), return_pooled=True)
    results["text"], results["pooled"] = found
    weighted = clip.encode_from_tokens(clip.tokenize("(red:1.4) critter"), return_pooled=True)
    results["weighted"] = weighted[0]
    states, embedding = bench.host.HostEncoder(clip_vision)(given["pixels"])
    results["states"], results["embedding"] = states, embedding
    results["own_states"] = clip_vision.encode_image(given["picture"])["penultimate_hidden_states"]
    results["decoded"] = vae.decode(given["latents"])
    results["encoded"] = vae.encode(given["picture"])
    network = model.model.diffusion_model
    results["predicted"] = network(
        given["latents"], given["times"], given["context"], given["added"], transformer_options={}
    )
    copied = model.clone()
    again, arguments = model.cached_patcher_init
    other = again(*arguments, disable_dynamic=True)
    assert torch.equal(other.model.diffusion_model.out[2].weight, network.out[2].weight)
files.save_tensors(FOLDER / "results.safetensors", {k: v.float() for k, v in results.items()})
