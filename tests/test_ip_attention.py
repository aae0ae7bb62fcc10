"""Decoupled attention: the published numbers, the index map, and the processor inside a real tiny UNet."""

import csv
import logging
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import linear

from pit_core.errors import PitError
from pit_core.ip_adapter.adapter import IPAdapter, IPLayers, new_ip_adapter
from pit_core.ip_adapter.attention import (
    TokenSource,
    decoupled_attention,
    plain_attention,
    resize_mask,
    token_grid,
)
from pit_core.ip_adapter.layers import (
    layers_of_config,
    layers_of_ldm_shapes,
    layers_of_unet,
    weights_by_layer,
)
from pit_core.ip_adapter.processor import install_ip_adapter, installed_context, uninstall_ip_adapter
from pit_core.ip_adapter.resampler import ImageProjection, Resampler

log = logging.getLogger(__name__)
GOLDENS = Path(__file__).parent / "goldens"

SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}
SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
TINY = {
    **SDXL,
    "block_out_channels": (16, 32, 48),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 24,
    "attention_head_dim": (2, 2, 4),
    "norm_num_groups": 8,
    "layers_per_block": (2, 1, 2),
}


def tiny_unet(seed=0):
    torch.manual_seed(seed)
    return UNet2DConditionModel(**TINY).eval().requires_grad_(False)


def tiny_adapter(unet, seed=1, tokens=3):
    torch.manual_seed(seed)
    adapter = new_ip_adapter(unet, ImageProjection(embedding_dim=10, output_dim=24, num_tokens=tokens))
    for parameter in adapter.layers.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter.requires_grad_(False)


def inputs(rows=2, size=(8, 8), seed=2):
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(rows, 4, *size, generator=generator)
    return sample, torch.randn(rows, 5, 24, generator=generator)


def run(unet, sample, text, t=10, **kwargs):
    return unet(sample, t, encoder_hidden_states=text, **kwargs).sample


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# arithmetic


def test_decoupled_attention_meets_the_golden():
    g = load_file(GOLDENS / "decoupled_attention.safetensors")
    q = linear(g["hidden"], g["attn.to_q.weight"])
    k, v = linear(g["text"], g["attn.to_k.weight"]), linear(g["text"], g["attn.to_v.weight"])
    k_ip = linear(g["ip_tokens"], g["ip.to_k_ip.weight"])
    v_ip = linear(g["ip_tokens"], g["ip.to_v_ip.weight"])
    z = decoupled_attention(q, k, v, k_ip, v_ip, heads=4, weight=0.7)
    error = (linear(z, g["attn.to_out.0.weight"], g["attn.to_out.0.bias"]) - g["output"]).abs().max().item()
    log.info("decoupled_attention: largest error %.2e", error)
    assert error < 2e-5


def test_weight_zero_is_the_plain_attention_bit_for_bit():
    q, k, v = randn(2, 9, 16), randn(2, 5, 16, seed=1), randn(2, 5, 16, seed=2)
    nan = torch.full((2, 3, 16), float("nan"))
    assert torch.equal(decoupled_attention(q, k, v, nan, nan, 4, weight=0.0), plain_attention(q, k, v, 4))


def test_mask_multiplies_the_image_term_only():
    q, k, v = randn(2, 6, 16), randn(2, 5, 16, seed=1), randn(2, 5, 16, seed=2)
    k_ip, v_ip = randn(2, 3, 16, seed=3), randn(2, 3, 16, seed=4)
    mask = torch.tensor([[1.0, 0, 0.5, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    plain, full = plain_attention(q, k, v, 2), decoupled_attention(q, k, v, k_ip, v_ip, 2, 0.8)
    masked = decoupled_attention(q, k, v, k_ip, v_ip, 2, 0.8, mask=mask)
    assert torch.allclose(masked, plain + (full - plain) * mask[..., None], atol=1e-6)
    assert torch.equal(masked, decoupled_attention(q, k, v, k_ip, v_ip, 2, 0.8, mask=mask[..., None]))
    assert torch.equal(masked[1], plain[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_image_keys_follow_the_dtype_of_q_and_one_row_serves_all(dtype):
    q, k, v = (randn(4, n, 16, seed=n).to(dtype) for n in (9, 5, 5))
    k_ip, v_ip = randn(1, 3, 16, seed=3), randn(1, 3, 16, seed=4)
    result = decoupled_attention(q, k, v, k_ip, v_ip, 4)
    assert result.dtype == dtype
    expected = decoupled_attention(q, k, v, k_ip.expand(4, -1, -1), v_ip.expand(4, -1, -1), 4)
    assert torch.equal(result, expected)


def test_row_counts_that_do_not_match_are_named():
    with pytest.raises(PitError, match="have 3 rows, but the model runs 4"):
        decoupled_attention(*(randn(4, 2, 8) for _ in range(3)), *(randn(3, 2, 8) for _ in range(2)), 2)


def test_token_grid_halves_rounding_up_like_the_unet():
    assert token_grid(64 * 48, (128, 96)) == (64, 48)
    assert token_grid(5 * 3, (17, 9)) == (5, 3)
    assert token_grid(2 * 128, (4, 256)) == (2, 128)
    assert token_grid(1, (1, 1)) == (1, 1)
    with pytest.raises(PitError, match="has 7 tokens"):
        token_grid(7, (8, 8))


def test_mask_is_resized_to_the_grid_exactly_and_bilinearly():
    ramp = torch.linspace(0, 1, 16).expand(1, 10, 16)
    resized = resize_mask(ramp, (5, 4)).reshape(5, 4)
    assert torch.allclose(resized, torch.tensor([1.5, 5.5, 9.5, 13.5]).div(15).expand(5, 4), atol=1e-6)
    assert torch.equal(resize_mask(torch.ones(2, 7, 3), (2, 5)), torch.ones(2, 10))
    with pytest.raises(PitError, match="batch, height, width"):
        resize_mask(torch.ones(7, 3), (2, 5))


# index map


def csv_rows():
    with (GOLDENS / "sdxl_attention_modules.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["ip_adapter_key"]]


def as_row(layer):
    side, number, transformer = layer.comfy_block
    numbers = (layer.width, layer.context, side, number, transformer, layer.key)
    return (layer.module, *map(str, numbers))


@pytest.fixture(scope="module")
def sdxl_unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**SDXL)


def test_sdxl_map_matches_the_published_table_row_by_row(sdxl_unet):
    columns = (
        "module",
        "inner",
        "kv_in",
        "comfy_block",
        "comfy_number",
        "comfy_transformer",
        "ip_adapter_key",
    )
    expected = [tuple(row[c] for c in columns) for row in csv_rows()]
    assert len(expected) == 70
    assert [as_row(layer) for layer in layers_of_config(SDXL)] == expected
    assert [as_row(layer) for layer in layers_of_unet(sdxl_unet)] == expected


def test_adapter_order_is_the_order_of_diffusers_own_processors(sdxl_unet):
    names = [n.removesuffix(".processor") for n in sdxl_unet.attn_processors]
    assert [names.index(layer.module) for layer in layers_of_unet(sdxl_unet)] == list(range(1, 140, 2))


def test_sd15_has_sixteen_layers():
    layers = layers_of_config(SD15)
    assert [layer.key for layer in layers] == list(range(1, 32, 2))
    assert [layer.width for layer in layers] == [320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [320] * 3 + [
        1280
    ]
    assert [layer.comfy_block[:2] for layer in layers] == (
        [("input", n) for n in (1, 2, 4, 5, 7, 8)] + [("output", n) for n in range(3, 12)] + [("middle", 0)]
    )
    assert [layer.transformer_index for layer in layers] == [*range(6), *range(7, 16), 6]


def test_transformer_indices_count_in_execution_order():
    index = {layer.comfy_block[:2]: layer.transformer_index for layer in layers_of_config(SDXL)}
    assert [index["input", n] for n in (4, 5, 7, 8)] == [0, 1, 2, 3]
    assert index["middle", 0] == 4
    assert [index["output", n] for n in range(6)] == [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"transformer_layers_per_block": (1, 3, 1)},
        {"transformer_layers_per_block": 2},
        {"layers_per_block": 1},
        {"layers_per_block": (1, 2, 3), "transformer_layers_per_block": (1, 1, 1)},
        {
            "transformer_layers_per_block": ((1, 1), (2,), (1, 3)),
            "reverse_transformer_layers_per_block": ((1, 2, 1), (2, 1), (1, 1, 1)),
        },
        {"mid_block_type": None},
        {"cross_attention_dim": (8, 16, 24)},
    ],
)
def test_map_from_a_config_equals_the_map_from_the_built_unet(changes):
    config = {**TINY, **changes}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert layers_of_config(config) == layers_of_unet(unet)
    assert layers_of_config(unet.config) == layers_of_unet(unet)


def test_map_from_original_names_gives_the_same_layers():
    expected = layers_of_config(SDXL)
    shapes = {"model.diffusion_model.input_blocks.1.0.in_layers.0.weight": (320,)}
    for layer in expected[::-1]:
        side, number, i = layer.comfy_block
        place = "middle_block.1" if side == "middle" else f"{side}_blocks.{number}.1"
        prefix = f"model.diffusion_model.{place}.transformer_blocks.{i}"
        shapes[f"{prefix}.attn2.to_k.weight"] = (layer.width, layer.context)
        shapes[f"{prefix}.attn1.to_k.weight"] = (layer.width, layer.width)
    found = layers_of_ldm_shapes(shapes)
    assert found[4].module == "input_blocks.7.1.transformer_blocks.0.attn2"
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.index, ours.width, ours.context, ours.comfy_block, ours.transformer_index) == (
            theirs.index,
            theirs.width,
            theirs.context,
            theirs.comfy_block,
            theirs.transformer_index,
        )


def test_models_without_cross_attention_are_refused():
    with pytest.raises(PitError, match="no text cross-attention"):
        layers_of_unet(nn.Linear(2, 2))
    with pytest.raises(PitError, match="no text cross-attention"):
        layers_of_ldm_shapes({"double_blocks.0.img_attn.qkv.weight": (3, 3)})
    with pytest.raises(PitError, match="SimpleCrossAttnDownBlock2D"):
        layers_of_config({**SDXL, "down_block_types": ("SimpleCrossAttnDownBlock2D",) * 3})
    with pytest.raises(PitError, match="must be equal"):
        layers_of_config({**SDXL, "block_out_channels": (320, 640)})


def test_too_few_depths_of_the_way_up_are_told_in_a_sentence():
    with pytest.raises(PitError, match=r"gives 1 values, \[1\], where 3 are needed"):
        layers_of_config({**SDXL, "reverse_transformer_layers_per_block": [1]})


def test_weights_by_transformer_index_reach_every_layer_of_it():
    layers = layers_of_config(SDXL)
    weights = weights_by_layer(layers, {6: 1.0, 3: 0.5})
    assert {n for n, w in weights.items() if w == 1.0} == {
        la.index for la in layers if la.comfy_block[:2] == ("output", 1)
    }
    assert sum(w == 0.5 for w in weights.values()) == 10 and len(weights) == 70
    with pytest.raises(PitError, match="transformer 11"):
        weights_by_layer(layers, {11: 1.0})


# inside a UNet


def reference_forward(unet, sample, text, terms):
    """The same run with the decoupled attention written out in hooks on to_out, by loops over heads.

    terms: (adapter, tokens per row, weight per layer n, mask per row or None).
    """
    handles = []
    for layer in layers_of_unet(unet):
        attn = unet.get_submodule(layer.module)

        def add(module, args, attn=attn, layer=layer):
            (z,) = args
            q = attn.to_q(attn.last_input)
            for adapter, tokens, weight, mask in terms:
                ours = adapter.layers[str(layer.key)]
                k, v = ours.to_k_ip(tokens), ours.to_v_ip(tokens)
                parts = []
                for qh, kh, vh in zip(*(t.chunk(attn.heads, dim=-1) for t in (q, k, v)), strict=True):
                    scores = qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5
                    parts.append(scores.softmax(-1) @ vh)
                term = torch.cat(parts, dim=-1) * weight[layer.index]
                if mask is not None:
                    grid = token_grid(q.shape[1], tuple(sample.shape[-2:]))
                    term = term * resize_mask(mask, grid)[..., None]
                z = z + term
            return (z,)

        def remember(module, args, attn=attn):
            attn.last_input = args[0]

        handles += [attn.register_forward_pre_hook(remember), attn.to_out[0].register_forward_pre_hook(add)]
    result = run(unet, sample, text)
    for handle in handles:
        handle.remove()
    return result


@torch.no_grad()
def test_processor_equals_attention_written_out_by_hand():
    unet = tiny_unet()
    first, second = tiny_adapter(unet), tiny_adapter(unet, seed=5, tokens=2)
    sample, text = inputs(rows=4, size=(12, 8))
    cond, uncond, other = randn(2, 3, 24, seed=7), randn(1, 3, 24, seed=8), randn(1, 2, 24, seed=9)
    weights = {n: 0.2 * n for n in range(len(first.layers))}
    mask = torch.rand(2, 24, 16, generator=torch.Generator().manual_seed(3))
    ones = dict.fromkeys(weights, 0.6)
    rows = torch.cat([uncond, uncond, cond])
    expected = reference_forward(
        unet,
        sample,
        text,
        [(first, rows, weights, mask.repeat(2, 1, 1)), (second, other.expand(4, -1, -1), ones, None)],
    )
    context = install_ip_adapter(unet, first)
    context.add(cond, uncond, weight=weights, mask=mask)
    context.add(other, weight=0.6, adapter=second)
    result = run(unet, sample, text)
    assert torch.allclose(result, expected, atol=1e-5)
    assert not torch.allclose(result, reference_forward(tiny_unet(), sample, text, []), atol=1e-3)


@torch.no_grad()
def test_tokens_per_row_per_half_and_for_all_agree():
    unet = tiny_unet()
    context = install_ip_adapter(unet, tiny_adapter(unet))
    sample, text = inputs(rows=4)
    cond, uncond = randn(2, 3, 24, seed=7), randn(2, 3, 24, seed=8)
    context.set_tokens(cond, uncond)
    halves = run(unet, sample, text)
    context.set_tokens(torch.cat([uncond, cond]))
    assert torch.allclose(run(unet, sample, text), halves, atol=1e-6)
    context.set_tokens(cond, uncond)
    context.order = ("cond", "uncond")
    swapped = run(unet, sample.roll(2, 0), text.roll(2, 0)).roll(2, 0)
    assert torch.allclose(swapped, halves, atol=1e-5)
    context.order = ("uncond",)
    alone = run(unet, sample[:2], text[:2])
    assert torch.allclose(alone, halves[:2], atol=1e-5)


@torch.no_grad()
def test_both_halves_may_share_the_tokens():
    unet = tiny_unet()
    context = install_ip_adapter(unet, tiny_adapter(unet))
    sample, text = inputs(rows=4)
    cond = randn(2, 3, 24, seed=7)
    context.set_tokens(cond, cond)
    expected = run(unet, sample, text)
    context.set_tokens(cond)
    context.order = ("uncond", "cond")
    assert torch.allclose(run(unet, sample, text), expected, atol=1e-6)


@torch.no_grad()
def test_shorter_unconditional_tokens_are_repeated_without_changing_the_attention():
    unet = tiny_unet()
    context = install_ip_adapter(unet, tiny_adapter(unet))
    sample, text = inputs(rows=2)
    cond, uncond = randn(1, 6, 24, seed=7), randn(1, 3, 24, seed=8)
    context.set_tokens(cond, uncond)
    first = run(unet, sample, text)[:1]
    context.set_tokens(uncond)
    assert torch.allclose(run(unet, sample[:1], text[:1]), first, atol=1e-5)
    with pytest.raises(PitError, match="has 4 tokens and the conditional one 6"):
        context.add(cond, randn(1, 4, 24))


def count_projections(adapter):
    calls = []
    for layer in adapter.layers.values():
        layer.to_k_ip.register_forward_hook(lambda *_: calls.append("k"))
        layer.to_v_ip.register_forward_hook(lambda *_: calls.append("v"))
    return calls


def test_layers_of_a_host_that_move_their_weights_compute_where_the_queries_are():
    seen = []

    class Operations:
        class Linear(nn.Linear):
            def forward(self, x):
                seen.append(x.dtype)
                return linear(x, self.weight.to(x))

    layers = IPLayers([16], 24, operations=Operations)
    source = TokenSource(layers, randn(1, 3, 24))
    assert source.term(randn(2, 9, 16).half(), 0, heads=2).dtype == torch.float16
    assert seen == [torch.float16] * 2
    plain = IPLayers([16], 24)
    plain.load_state_dict(layers.state_dict())
    expected = TokenSource(plain, randn(1, 3, 24)).term(randn(2, 9, 16).half(), 0, heads=2)
    assert torch.allclose(source.term(randn(2, 9, 16).half(), 0, heads=2), expected, atol=2e-3)


@torch.no_grad()
def test_keys_and_values_are_computed_once_per_run_not_per_step():
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    calls, layers = count_projections(adapter), len(adapter.layers)
    context = install_ip_adapter(unet, adapter)
    sample, text = inputs(rows=2)
    context.set_tokens(randn(1, 3, 24), randn(1, 3, 24, seed=1))
    for t in (900, 500, 100, 1):
        run(unet, sample, text, t)
    assert len(calls) == 2 * 2 * layers  # K and V, two halves, every layer: once
    context.set_tokens(randn(1, 3, 24))
    run(unet, sample, text)
    assert len(calls) == 2 * 3 * layers
    context.clear()
    run(unet, sample, text)
    assert len(calls) == 2 * 3 * layers


def test_training_computes_keys_per_forward_and_gradients_reach_adapter_and_projector():
    unet = tiny_unet()
    adapter = tiny_adapter(unet).requires_grad_(True)
    calls, layers = count_projections(adapter), len(adapter.layers)
    context = install_ip_adapter(unet, adapter)
    context.train = True
    sample, text = inputs(rows=2)
    for _ in range(2):
        context.set_tokens(adapter.projector(randn(2, 10)))
        for _ in range(2):
            loss = run(unet, sample, text).square().mean()
        loss.backward()
    assert len(calls) == 2 * 4 * layers
    missing = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []
    assert all(p.grad is None for p in unet.parameters())


def test_training_works_under_gradient_checkpointing():
    unet = tiny_unet().train()
    adapter = tiny_adapter(unet).requires_grad_(True)
    context = install_ip_adapter(unet, adapter)
    context.train = True
    sample, text = inputs(rows=2)

    def gradients():
        adapter.zero_grad()
        context.set_tokens(adapter.projector(randn(2, 10)))
        run(unet, sample, text).square().mean().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    plain = gradients()
    unet.enable_gradient_checkpointing()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, gradients(), strict=True))


@torch.no_grad()
def test_uninstalling_gives_the_base_model_back_bit_for_bit():
    unet = tiny_unet()
    sample, text = inputs()
    before, weights = run(unet, sample, text), {k: v.clone() for k, v in unet.state_dict().items()}
    processors = dict(unet.attn_processors)
    context = install_ip_adapter(unet, tiny_adapter(unet))
    assert torch.equal(run(unet, sample, text), before)  # installed, but no tokens
    context.set_tokens(randn(1, 3, 24), weight=0.0)
    assert torch.equal(run(unet, sample, text), before)
    context.set_tokens(randn(1, 3, 24))
    assert not torch.equal(run(unet, sample, text), before)
    assert unet.state_dict().keys() == weights.keys()
    uninstall_ip_adapter(unet)
    assert torch.equal(run(unet, sample, text), before)
    assert all(torch.equal(v, weights[k]) for k, v in unet.state_dict().items())
    assert unet.attn_processors == processors
    assert installed_context(unet) is None and not unet._forward_pre_hooks
    uninstall_ip_adapter(unet)  # twice does no harm


def test_installing_twice_keeps_the_context():
    unet = tiny_unet()
    context = install_ip_adapter(unet)
    assert install_ip_adapter(unet, tiny_adapter(unet)) is context
    uninstall_ip_adapter(unet)
    assert install_ip_adapter(unet) is not context


@torch.no_grad()
def test_a_masked_half_leaves_far_pixels_as_without_the_adapter():
    unet = tiny_unet()
    context = install_ip_adapter(unet, tiny_adapter(unet))
    sample, text = inputs(size=(9, 14))
    plain = run(unet, sample, text)
    context.set_tokens(randn(1, 3, 24), mask=torch.zeros(1, 72, 112))
    assert torch.equal(run(unet, sample, text), plain)
    context.set_tokens(randn(1, 3, 24))
    full = run(unet, sample, text)
    context.set_tokens(randn(1, 3, 24), mask=torch.ones(1, 5, 5))
    assert torch.equal(run(unet, sample, text), full)


@torch.no_grad()
def test_weights_per_layer_silence_the_layers_that_are_not_named():
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    calls = count_projections(adapter)
    context = install_ip_adapter(unet, adapter)
    sample, text = inputs()
    context.set_tokens(randn(1, 3, 24), weight=weights_by_layer(context.layers, {3: 1.0}))
    run(unet, sample, text)
    assert len(calls) == 2 * sum(layer.transformer_index == 3 for layer in context.layers)


@torch.no_grad()
def test_a_text_mask_reaches_the_text_attention():
    unet = tiny_unet()
    context = install_ip_adapter(unet, tiny_adapter(unet))
    context.set_tokens(randn(1, 3, 24))
    sample, text = inputs()
    mask = torch.tensor([[1, 1, 0, 0, 0]] * 2)
    masked = run(unet, sample, text, encoder_attention_mask=mask)
    assert torch.allclose(masked, run(unet, sample, text[:, :2]), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_unet_takes_fp32_adapters_and_tokens(dtype):
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    sample, text = inputs()
    context = install_ip_adapter(unet.to(dtype), adapter)
    context.set_tokens(randn(1, 3, 24))
    result = run(unet, sample.to(dtype), text.to(dtype))
    assert result.dtype == dtype and torch.isfinite(result).all()


def test_adapters_of_another_family_are_refused_by_name():
    unet = tiny_unet()
    sd15 = layers_of_config(SD15)
    with torch.device("meta"):
        wrong = IPLayers([layer.width for layer in sd15], 768)
    with pytest.raises(
        PitError, match=r"SD1\.5 \(16 layers, text width 768\).*a UNet with 15 layers, text width 24"
    ):
        install_ip_adapter(unet, wrong)
    with pytest.raises(PitError, match="SDXL"):
        wrong.check_fits(layers_of_config(SDXL))
    widths = [layer.width for layer in layers_of_unet(unet)]
    with pytest.raises(PitError, match="layer 0 is 32 wide instead of 8"):
        install_ip_adapter(unet, IPLayers([8, *widths[1:]], 24))
    with pytest.raises(PitError, match="width 40"):
        IPAdapter(Resampler(8, 1, 4, 2, 2, 8, 40), IPLayers(widths, 24))


def test_tokens_of_the_wrong_shape_are_refused():
    layers = IPLayers([8], 24)
    for shape in [(1, 3, 32), (3, 24), (0, 3, 24), (1, 0, 24)]:
        with pytest.raises(PitError, match="batch, tokens, 24"):
            TokenSource(layers, torch.zeros(shape))
    source = TokenSource(layers, randn(3, 2, 24))
    with pytest.raises(PitError, match="3 rows of tokens"):
        source.term(randn(4, 4, 8), 0, heads=2)
    with pytest.raises(PitError, match="batch of 3 rows"):
        source.term(randn(3, 4, 8), 0, heads=2, order=("uncond", "cond"))
    with pytest.raises(PitError, match="size of the latents"):
        TokenSource(layers, randn(1, 2, 24), mask=torch.ones(1, 2, 2)).term(randn(1, 4, 8), 0, heads=2)


def test_new_adapters_start_from_the_unets_text_weights():
    unet = tiny_unet()
    adapter = new_ip_adapter(unet, ImageProjection(10, 24, 3))
    for layer in layers_of_unet(unet):
        attn = unet.get_submodule(layer.module)
        assert torch.equal(adapter.layers[str(layer.key)].to_k_ip.weight, attn.to_k.weight)
        assert torch.equal(adapter.layers[str(layer.key)].to_v_ip.weight, attn.to_v.weight)
    assert all(p.requires_grad for p in adapter.parameters())
    assert "ip_adapter.1.to_k_ip.weight" in adapter.state_dict()
