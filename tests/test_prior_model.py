"""The IP-Prior's network against the published numbers and against a slow version written out in loops."""

import json
import logging
import math
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from pit_core.errors import PitError
from pit_core.ip_prior.model import (
    IPPrior,
    IPPriorConfig,
    init_for_training,
    rotary_table,
    rotate,
    time_features,
)

log = logging.getLogger(__name__)
GOLDENS = Path(__file__).parent / "goldens"
TINY = {"embedding_dim": 24, "hidden_dim": 32, "n_layers": 2, "n_heads": 4}


def read_golden(name):
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["config"]), file.metadata()["salt"]


def seeded_weights(shapes, salt):
    """The rule in the goldens' description: every tensor from its own key."""
    weights = {}
    for key, shape in sorted(shapes.items()):
        t = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32((salt + key).encode())))
        if len(shape) > 1:
            weights[key] = t.div_(math.sqrt(shape[-1]))
        else:
            weights[key] = 1 + 0.1 * t if key.endswith("weight") else 0.1 * t
    return weights


def golden_prior(name):
    golden, config, salt = read_golden(name)
    shapes = json.loads((GOLDENS / f"{name}.keys.json").read_text())
    prior = IPPrior(**config, device="meta")
    prior.load_state_dict(seeded_weights(shapes, salt), assign=True)
    return prior.eval(), golden


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return IPPrior(**{**TINY, **changes})


def tiny_inputs(slots=3, batch=2):
    generator = torch.Generator().manual_seed(5)
    x, cond = (torch.randn(batch, n, 24, generator=generator) for n in (16, 16 * slots))
    return x, torch.rand(batch, generator=generator), cond


@torch.no_grad()
def test_small_golden():
    prior, golden = golden_prior("ip_prior_small")
    error = (prior(golden["noise"], golden["t"], golden["cond"]) - golden["velocity"]).abs().max().item()
    log.info("ip_prior_small velocity: largest error %.1e", error)
    assert error < 2e-5


@torch.no_grad()
def test_full_size_golden():
    """270 million parameters, made by the rule: about 4 s and 1.3 GB."""
    prior, golden = golden_prior("ip_prior_full")
    assert sum(p.numel() for p in prior.parameters()) == 269_871_104
    difference = prior(golden["noise"], golden["t"], golden["cond"]) - golden["velocity"]
    error = (difference.norm() / golden["velocity"].norm()).item()
    log.info("ip_prior_full velocity: relative error %.1e, largest %.1e", error, difference.abs().max())
    assert error < 1e-3
    assert difference.abs().max() < 1e-3 * golden["velocity"].abs().max()


@pytest.mark.parametrize("name", ["ip_prior_small", "ip_prior_full"])
def test_keys_and_shapes_are_the_released_ones(name):
    _, config, _ = read_golden(name)
    state = IPPrior(**config, device="meta").state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == json.loads(
        (GOLDENS / f"{name}.keys.json").read_text()
    )


def slow_attention(attention, x, heads):
    """One query at a time; a pair (a, b) is the complex number a + ib, turned by its position's angle."""
    length, dim = x.shape
    d = dim // heads
    q = attention.q_norm(x @ attention.wq.weight.T)
    k = attention.k_norm(x @ attention.wk.weight.T)
    v = x @ attention.wv.weight.T

    def turned(vector, position):
        pairs = torch.complex(vector[0::2], vector[1::2])
        angles = torch.tensor([position * 10000 ** (-2 * i / d) for i in range(d // 2)])
        return pairs * torch.polar(torch.ones(d // 2), angles)

    out = torch.zeros(length, dim)
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        keys = [turned(k[j, part], j) for j in range(length)]
        for i in range(length):
            query = turned(q[i, part], i)
            scores = torch.stack([(query * key.conj()).real.sum() / math.sqrt(d) for key in keys])
            out[i, part] = scores.softmax(0) @ v[:, part]
    return out @ attention.wo.weight.T


def slow_prior(prior, x, t, cond):
    """The whole network for one row, from the paper's description, sharing only the weights."""
    dim, heads = prior.config.hidden_dim, prior.config.n_heads
    angles = torch.tensor([t * 10000 ** (-i / 128) for i in range(128)])
    time = prior.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()]))
    h = prior.x_embedder(torch.cat([x, cond]))
    for block in prior.layers:
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = block.adaLN_modulation(time).split(dim)
        h = h + gate_a * slow_attention(
            block.attention, block.attention_norm(h) * (1 + scale_a) + shift_a, heads
        )
        f = block.ffn_norm(h) * (1 + scale_f) + shift_f
        ff = block.feed_forward
        h = h + gate_f * ff.w2(nn.functional.silu(ff.w1(f)) * ff.w3(f))
    shift, scale = prior.final_layer.adaLN_modulation(time).split(dim)
    mean, variance = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, unbiased=False)
    h = (h - mean) / (variance + 1e-6).sqrt() * (1 + scale) + shift
    return prior.final_layer.linear(h)[: prior.config.num_tokens]


@torch.no_grad()
def test_the_network_equals_a_slow_version_written_out():
    prior, (x, t, cond) = tiny(), tiny_inputs(slots=2)
    fast = prior(x, t, cond)
    for row in range(2):
        assert torch.allclose(fast[row], slow_prior(prior, x[row], t[row].item(), cond[row]), atol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    table = rotary_table(40, 8)
    turned_q, turned_k = (rotate(v.expand(1, 1, 40, 8), table)[0, 0] for v in (q, k))
    scores = turned_q @ turned_k.T
    for distance in (0, 3, 11):
        line = scores.diagonal(distance)
        assert torch.allclose(line, line[:1].expand_as(line), atol=1e-5)


def test_time_features_start_with_the_cosines():
    features = time_features(torch.tensor([0.0, 1.0]))
    assert torch.equal(features[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    assert features[1, 0].item() == pytest.approx(math.cos(1))
    assert features[1, 128].item() == pytest.approx(math.sin(1))


@torch.no_grad()
def test_the_order_of_the_parts_matters():
    prior, (x, t, cond) = tiny(), tiny_inputs(slots=3)
    swapped = torch.cat([cond[:, 16:32], cond[:, :16], cond[:, 32:]], dim=1)
    assert not torch.allclose(prior(x, t, cond), prior(x, t, swapped), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("slots", [1, 3, 9])
def test_any_number_of_slots(slots):
    x, t, cond = tiny_inputs(slots)
    assert tiny()(x, t, cond).shape == (2, 16, 24)


def test_gradient_checkpointing_changes_no_gradient():
    prior, (x, t, cond) = tiny(), tiny_inputs()
    grads = []
    for flag in (False, True):
        prior.zero_grad()
        prior.gradient_checkpointing = flag
        prior(x, t, cond).square().mean().backward()
        grads.append([p.grad.clone() for p in prior.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))
    assert all(g.abs().sum() > 0 for g in grads[0])


def test_a_fresh_prior_to_train_predicts_zero_and_can_learn():
    prior, (x, t, cond) = tiny(), tiny_inputs()
    init_for_training(prior, torch.Generator().manual_seed(0))
    again = init_for_training(tiny(seed=9), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(prior.parameters(), again.parameters(), strict=True))
    assert torch.equal(prior(x, t, cond), torch.zeros(2, 16, 24))

    target = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = (prior(x, t, cond) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


class CastingOperations:
    """What a host's layers do: weights rest in one dtype and are cast to the input's dtype in forward."""

    class Linear(nn.Linear):
        def forward(self, x):
            bias = None if self.bias is None else self.bias.to(x)
            return nn.functional.linear(x, self.weight.to(x), bias)

    class LayerNorm(nn.LayerNorm):
        def forward(self, x):
            weight, bias = (None if p is None else p.to(x) for p in (self.weight, self.bias))
            return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


@torch.no_grad()
@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_that_cast_can_take_the_place_of_torch_nn(storage, compute):
    prior, (x, t, cond) = tiny(), tiny_inputs()
    other = IPPrior(**TINY, operations=CastingOperations, dtype=storage, device="meta").to_empty(device="cpu")
    other.load_state_dict(prior.state_dict())
    assert all(type(m).__module__ != "torch.nn.modules.linear" for m in other.modules())
    out = other(x.to(compute), t, cond.to(compute))
    assert out.dtype == compute
    assert (out.float() - prior(x, t, cond)).norm() < 0.2 * prior(x, t, cond).norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_single(dtype):
    prior, golden = golden_prior("ip_prior_small")
    exact = prior(golden["noise"], golden["t"], golden["cond"])
    half = prior.to(dtype)(golden["noise"].to(dtype), golden["t"], golden["cond"].to(dtype))
    assert half.dtype == dtype
    assert (half.float() - exact).norm() / exact.norm() < (0.002 if dtype == torch.float16 else 0.02)


def test_the_released_sizes_are_the_defaults():
    config = IPPriorConfig()
    assert (config.n_heads, config.time_dim, config.ff_dim) == (32, 1024, 5632)
    assert IPPriorConfig(64, 128, 2).n_heads == 2  # hidden / 64 where unknown


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_dim": 100, "n_heads": 3}, "hidden_dim 100 and n_heads 3"),
        ({"hidden_dim": 12, "n_heads": 4}, "hidden_dim 12 and n_heads 4"),  # heads of odd width have no pairs
        ({"n_layers": 0}, "n_layers .* got 0"),
        ({"embedding_dim": -1}, "embedding_dim .* got -1"),
        ({"n_heads": 2.0}, "n_heads .* got 2.0"),
        ({"num_tokens": True}, "num_tokens .* got True"),
        ({"hidden_dim": None}, "hidden_dim .* got None"),
    ],
)
def test_bad_sizes_are_named_with_their_values(sizes, message):
    with pytest.raises(PitError, match=message):
        IPPriorConfig(**sizes)


def test_inputs_of_another_shape_are_named():
    prior, (x, t, cond) = tiny(), tiny_inputs()
    with pytest.raises(PitError, match=r"expected noisy tokens \(B, 16, 24\), got \(2, 15, 24\)"):
        prior(x[:, 1:], t, cond)
    with pytest.raises(PitError, match=r"expected condition tokens \(2, N, 24\), got \(1, 48, 24\)"):
        prior(x, t, cond[:1])
