"""What is held where: on the device while sampling, and afterwards; what is computed once."""

import gc
import weakref
from typing import Any

import pytest
import torch
from benches import Bench, RealBench, randn
from torch import Tensor, nn

SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
}
"""diffusers' words for the part of SDXL that an adapter reads."""


def adapter_of_sdxl(bench: Bench) -> tuple[Any, list[Any]]:
    """(adapter, layers) at SDXL's size, in half precision; its rows repeat, to take little memory here."""
    parts = {name: bench.part(f"pit_core.ip_adapter.{name}") for name in ("adapter", "resampler", "layers")}
    layers = parts["layers"].layers_of_config(SDXL)
    operations = bench.host.comfy.ops.manual_cast
    options = {"operations": operations, "device": "meta", "dtype": torch.float16}
    weights = parts["adapter"].IPLayers([layer.width for layer in layers], 2048, **options)
    row = 0.02 * randn((1, 2048), 1).half()
    for layer in weights.values():
        for linear in (layer.to_k_ip, layer.to_v_ip):
            linear.weight = nn.Parameter(row.expand(linear.weight.shape), requires_grad=False)
    projector = parts["resampler"].Resampler(64, 1, 64, 1, 16, 32, 2048)
    return bench.host.ManagedAdapter(parts["adapter"].IPAdapter(projector, weights)), layers


def bytes_held(applications: list[Any]) -> int:
    """Of whole memory blocks, each once."""
    tensors = [t for each in applications for kept in each._kept.values() for t in kept if torch.is_tensor(t)]
    blocks = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(blocks.values())


def run_every_layer(patched: Any, layers: list[Any], pictures: int, dtype: torch.dtype) -> None:
    patches = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    for layer in layers:
        q, k, v = (torch.zeros(2 * pictures, n, layer.width, dtype=dtype) for n in (4, 7, 7))
        options = {"n_heads": layer.width // 64, "cond_or_uncond": [1, 0], "activations_shape": [1, 1, 2, 2]}
        assert patches[layer.comfy_block](q, k, v, options).shape == q.shape


@pytest.mark.parametrize(
    ("dtype", "pictures", "limit"),
    [(torch.float16, 1, 16e6), (torch.float16, 2, 16e6), (torch.float32, 1, 22e6)],
)
def test_sdxl_takes_less_than_16_mb_a_picture(
    bench: Bench, dtype: torch.dtype, pictures: int, limit: float
) -> None:
    """Keys and values of 16 tokens in all 70 layers, both halves, each picture with tokens of its own.

    Twice as much in float32, which SDXL runs in where there is no half precision, on CPUs.
    """
    adapter, layers = adapter_of_sdxl(bench)
    model = bench.model()
    model.model_dtype = lambda: dtype
    tokens = randn((2, pictures, 16, 2048), 3)
    weights = {layer.index: bench.part("pit_core.ip_adapter.weights").LayerWeight(1.0) for layer in layers}
    made = bench.host.make_applications(model, adapter, [(tokens[0], tokens[1], None)], weights)
    patched = bench.host.apply(model, layers, made)
    assert bytes_held(made) == 0
    run_every_layer(patched, layers, pictures, dtype)
    held = bytes_held(made)
    elsewhere = sum(p.numel() * p.element_size() for p in adapter.adapter.layers.parameters())
    print(f"{len(layers)} layers, {pictures} pictures: {held:,} bytes held; their weights {elsewhere:,}")  # noqa: T201
    assert len(layers) == 70 and elsewhere == 681_574_400
    assert 0 < held <= limit * pictures
    bench.host._release(patched)
    assert bytes_held(made) == 0


def test_the_adapter_can_be_gone_while_sampling(bench: Bench) -> None:
    adapter, model = bench.adapter(name="passing.safetensors"), bench.model()
    patched = bench.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=bench.tokens(1))
    before = bench.sample(patched)
    weights = weakref.ref(adapter.adapter.layers["1"].to_k_ip.weight)
    del adapter
    gc.collect()
    assert weights() is None
    assert torch.equal(bench.sample(patched), before)


def test_another_base_takes_the_same_keys_and_values(bench: Bench) -> None:
    adapter = bench.adapter()
    one, two = (
        bench.first("PiTApplyTokens", model=bench.model(), ip_adapter=adapter, tokens=bench.tokens(1))
        for _ in range(2)
    )
    first, second = (next(iter(bench.host.applications_of(each))) for each in (one, two))
    assert first.cond is second.cond and first.uncond is second.uncond


def test_each_picture_is_encoded_once_whoever_brings_it(bench: Bench) -> None:
    encoder, adapter = bench.clip_vision(), bench.adapter()
    seen: list[int] = []
    encoder.model.register_forward_hook(lambda *_: seen.append(1))
    image = torch.rand(2, 40, 60, 3, generator=torch.Generator().manual_seed(11))
    inputs = {"ip_adapter": adapter, "clip_vision": encoder}
    first = bench.first("PiTEncodeImage", **inputs, image=image)
    calls = len(seen)
    again = bench.first("PiTEncodeImage", **inputs, image=image.clone())
    reloaded = bench.first("PiTEncodeImage", clip_vision=encoder, ip_adapter=bench.adapter(), image=image)
    assert calls > 0 and len(seen) == calls
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.tokens, reloaded.tokens)
    bench.first("PiTEncodeImage", **inputs, image=image.flip(0)[:1])
    assert len(seen) == calls
    bench.first("PiTEncodeImage", **inputs, image=1 - image)
    assert len(seen) > calls


# in ComfyUI itself


def loaded(bench: RealBench, managed: Any) -> bool:
    found = bench.host.comfy.model_management.current_loaded_models
    return any(each.model is managed.patcher for each in found)


def test_the_adapters_layers_leave_the_device_before_sampling(real: RealBench) -> None:
    adapter, seen = real.adapter(name="leaving.safetensors"), []
    layers = adapter.adapter.layers
    compute = layers.keys_values
    layers.keys_values = lambda *inputs: seen.append(loaded(real, adapter.layers)) or compute(*inputs)
    real.first("PiTApplyTokens", model=real.model(), ip_adapter=adapter, tokens=real.tokens(1))
    assert seen and all(seen)
    assert not loaded(real, adapter.layers)


def test_what_else_is_loaded_stays_when_the_layers_leave(real: RealBench) -> None:
    adapter, model = real.adapter(), real.model()
    real.sample(model)
    real.first("PiTApplyTokens", model=model, ip_adapter=adapter, tokens=real.tokens(71))
    assert any(each.model is model for each in real.host.comfy.model_management.current_loaded_models)


def test_prior_and_projector_are_the_hosts_to_load_and_free(real: RealBench) -> None:
    adapter, prior = real.adapter(), real.first("PiTLoadPrior", file=real.prior_file())
    image = torch.rand(1, 20, 20, 3, generator=torch.Generator().manual_seed(12))

    def made() -> list[Tensor]:
        inputs = {
            "ip_adapter": adapter,
            "clip_vision": real.clip_vision(),
        }  # a new encoder: nothing is cached
        tokens = real.first("PiTEncodeImage", **inputs, image=image)
        return [tokens.tokens, real.first("PiTSamplePrior", prior=prior, parts=tokens, steps=2).tokens]

    first = made()
    assert loaded(real, adapter.projector) and loaded(real, prior.managed)
    real.host.comfy.model_management.unload_all_models()
    assert not loaded(real, adapter.projector) and not loaded(real, prior.managed)
    assert all(torch.equal(a, b) for a, b in zip(first, made(), strict=True))


@pytest.mark.parametrize("how", ["interrupt", "error"])
def test_nothing_stays_after_a_run_that_broke_off(real: RealBench, how: str) -> None:
    management = real.host.comfy.model_management
    model = real.model()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    inputs = {"model": model, "ip_adapter": real.adapter(), "tokens": real.tokens(1)}
    patched = real.first("PiTApplyTokens", **inputs, mask=torch.ones(8, 8), start_at=0.0, end_at=0.9)
    expected, kept = real.sample(patched, steps=3), []

    def callback(step: int, *_: Any) -> None:
        kept.append(bytes_held(list(real.host.applications_of(patched))))
        if how == "interrupt":
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()
        raise RuntimeError("out of memory")

    stop = management.InterruptProcessingException if how == "interrupt" else RuntimeError
    with pytest.raises(stop):
        real.sample(patched, steps=3, callback=callback)
    assert len(kept) == 1 and kept[0] > 0
    assert bytes_held(list(real.host.applications_of(patched))) == 0
    assert torch.equal(real.sample(patched, steps=3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


def test_a_model_offloaded_in_the_middle_of_a_run_goes_on(real: RealBench) -> None:
    management = real.host.comfy.model_management
    inputs = {"model": real.model(), "ip_adapter": real.adapter(), "tokens": real.tokens(1)}
    patched = real.first("PiTApplyTokens", **inputs)
    expected = real.sample(patched, steps=3)
    found = real.sample(patched, steps=3, callback=lambda *_: management.unload_all_models())
    assert torch.equal(found, expected)
    assert bytes_held(list(real.host.applications_of(patched))) == 0


def test_the_noise_level_is_not_kept(real: RealBench) -> None:
    """Not even the number on the device that start_at and end_at are compared with."""
    inputs = {"model": real.model(), "ip_adapter": real.adapter(), "tokens": real.tokens(1)}
    patched, seen = real.first("PiTApplyTokens", **inputs, end_at=0.9), []
    view = real.part("nodes.attention").VIEW
    patch = real.host._replacements(patched)["middle", 0, 0]
    attend = patch.attention
    patch.attention = lambda q, k, v, options: (
        seen.append(weakref.ref(options[view].sigmas)) or attend(q, k, v, options)
    )
    real.sample(patched)
    gc.collect()
    assert seen and all(each() is None for each in seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_give_what_full_ones_give(real: RealBench, dtype: torch.dtype) -> None:
    adapter, found = real.adapter(), {}
    for each in (torch.float32, dtype):
        inputs = {"model": real.model(dtype=each), "ip_adapter": adapter, "tokens": real.tokens(1)}
        patched, types = real.first("PiTApplyTokens", **inputs), set()
        real.sample(
            patched,
            callback=lambda *_, p=patched, t=types: t.update(
                tensor.dtype
                for application in real.host.applications_of(p)
                for k, v, _weight in application._kept.values()
                for tensor in (k, v)
            ),
        )
        assert types == {each}
        found[each] = real.sample(patched)
    error = float((found[dtype] - found[torch.float32]).abs().max() / found[torch.float32].abs().max())
    print(f"{dtype}: relative error {error:.2g}")  # noqa: T201
    assert torch.isfinite(found[dtype]).all() and error < 0.05
