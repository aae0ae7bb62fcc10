"""Both projections against the published numbers, and in half precision."""

import json
import logging
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pit_core.errors import PitError
from pit_core.ip_adapter.resampler import ImageProjection, Resampler

log = logging.getLogger(__name__)
GOLDENS = Path(__file__).parent / "goldens"
TINY = {
    "dim": 32,
    "depth": 2,
    "dim_head": 8,
    "heads": 4,
    "num_queries": 3,
    "embedding_dim": 24,
    "output_dim": 40,
    "ff_mult": 2,
}


def read_golden(name):
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def seeded_weights(name, salt):
    """The rule in the goldens' description: every tensor from its own key."""
    weights = {}
    for key, shape in sorted(json.loads((GOLDENS / f"{name}.keys.json").read_text()).items()):
        t = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32((salt + key).encode())))
        if len(shape) > 1:
            weights[key] = t / shape[-1] ** 0.5
        else:
            weights[key] = 1 + 0.1 * t if key.endswith("weight") else 0.1 * t
    return weights


def golden_resampler(name):
    tensors, metadata = read_golden(name)
    resampler = Resampler(**json.loads(metadata["config"]))
    resampler.load_state_dict(
        seeded_weights(name, metadata["salt"])
    )  # strict: the keys are the released ones
    with torch.inference_mode():
        return resampler(tensors["features"]), tensors["tokens"]


def test_small_resampler_meets_the_golden():
    tokens, expected = golden_resampler("resampler_small")
    error = (tokens - expected).abs().max().item()
    log.info("resampler_small: largest error %.2e", error)
    assert error < 2e-5


def test_full_size_resampler_meets_the_golden():
    tokens, expected = golden_resampler("resampler_plus_sdxl")
    error = ((tokens - expected).abs().max() / expected.abs().max()).item()
    log.info("resampler_plus_sdxl: largest relative error %.2e", error)
    assert error < 1e-3


def test_base_projection_meets_the_golden():
    tensors, metadata = read_golden("image_proj_base")
    projection = ImageProjection(embedding_dim=1024, output_dim=2048, num_tokens=4)
    projection.load_state_dict(seeded_weights("image_proj_base", metadata["salt"]))
    error = (projection(tensors["image_embeds"]) - tensors["tokens"]).abs().max().item()
    log.info("image_proj_base: largest error %.2e", error)
    assert error < 2e-5


def test_full_size_parameter_count():
    resampler = Resampler(1280, 4, 64, 20, 16, 1280, 2048, 4, device="meta")
    assert sum(p.numel() for p in resampler.parameters()) == 82_961_664


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_projected_in_fp32(dtype):
    torch.manual_seed(0)
    resampler, x = Resampler(**TINY), torch.randn(2, 5, 24).to(dtype)
    assert torch.equal(resampler(x), resampler(x.float()))
    assert resampler(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_converted_for_the_projection(dtype):
    torch.manual_seed(0)
    resampler, x = Resampler(**TINY).to(dtype), torch.randn(2, 5, 24)
    from_half = resampler(x)
    assert resampler.proj_in.weight.dtype == dtype
    assert torch.equal(from_half, resampler.float()(x))


def test_features_that_overflow_fp16_sums_stay_finite():
    resampler = Resampler(**{**TINY, "embedding_dim": 2048}).half()
    x = torch.full((1, 3, 2048), 6e4, dtype=torch.float16)
    with torch.no_grad():
        resampler.proj_in.weight.fill_(1.0)
    assert torch.isfinite(resampler(x)).all()
    projection = ImageProjection(embedding_dim=2048, output_dim=8, num_tokens=2).half()
    with torch.no_grad():
        projection.proj.weight.fill_(1.0)
    assert torch.isfinite(projection(x[:, 0])).all()


def test_autocast_is_left_alone_and_gradients_flow():
    resampler = Resampler(**TINY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = resampler(torch.randn(2, 5, 24)).square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in resampler.parameters())


def test_every_layer_comes_from_the_operations_namespace():
    class Operations:
        class Linear(nn.Linear):
            pass

        class LayerNorm(nn.LayerNorm):
            pass

    for module in (
        Resampler(**TINY, operations=Operations, dtype=torch.float16),
        ImageProjection(24, 40, 3, operations=Operations, dtype=torch.float16),
    ):
        layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
        assert layers and all(type(m) in (Operations.Linear, Operations.LayerNorm) for m in layers)
        assert all(p.dtype == torch.float16 for p in module.parameters())


def test_sizes_below_one_are_refused_with_their_values():
    with pytest.raises(PitError, match="'depth': 0"):
        Resampler(**{**TINY, "depth": 0})
    with pytest.raises(PitError, match="'num_tokens': 0"):
        ImageProjection(24, 40, 0)
