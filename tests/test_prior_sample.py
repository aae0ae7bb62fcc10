"""Sampling: the published 25-step results, guidance, and rows that do not affect each other."""

import json
import logging
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pit_core import flow
from pit_core.errors import PitError
from pit_core.ip_prior.model import IPPrior
from pit_core.ip_prior.sample import assemble, row_noise, sample_prior

log = logging.getLogger(__name__)
GOLDENS = Path(__file__).parent / "goldens"
NAN = float("nan")


@dataclass
class Slots:
    use_ref: bool = False


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDENS / "ip_prior_small.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@pytest.fixture(scope="module")
def prior():
    with safe_open(GOLDENS / "ip_prior_small.safetensors", "pt") as file:
        config, salt = json.loads(file.metadata()["config"]), file.metadata()["salt"]
    prior = IPPrior(**config)
    state = prior.state_dict()
    for key in sorted(state):
        generator = torch.Generator().manual_seed(zlib.crc32((salt + key).encode()))
        t = torch.randn(state[key].shape, generator=generator)
        one_dimensional = 1 + 0.1 * t if key.endswith("weight") else 0.1 * t
        state[key] = t / math.sqrt(t.shape[-1]) if t.ndim > 1 else one_dimensional
    prior.load_state_dict(state)
    return prior


def forwards(prior, call):
    """The shapes that the prior saw during `call`."""
    shapes = []
    hook = prior.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[2].shape)))
    try:
        call()
    finally:
        hook.remove()
    return shapes


@pytest.mark.parametrize("cfg_batch", ["auto", "one", "two"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sampled_cfg2", {}),
        ("sampled_cfg1", {"guidance": 1.0}),
        ("sampled_strength06_cfg2", {"strength": 0.6}),
    ],
)
def test_golden(prior, golden, name, settings, cfg_batch):
    init = {"init": golden["init"]} if "strength" in settings else {}
    out = sample_prior(
        prior,
        golden["cond"],
        golden["negative"],
        noise=golden["noise"],
        cfg_batch=cfg_batch,
        **init,
        **settings,
    )
    error = (out - golden[name]).abs().max().item()
    log.info("ip_prior_small %s (%s): largest error %.1e", name, cfg_batch, error)
    assert error < 1e-4
    assert error < 2e-5  # the forward's own tolerance, which 25 steps keep


def test_guidance_runs_in_one_forward_two_or_half(prior, golden):
    def shapes(**settings):
        call = {"steps": 1, "noise": golden["noise"], **settings}
        return forwards(prior, lambda: sample_prior(prior, golden["cond"], golden["negative"], **call))

    assert shapes() == shapes(cfg_batch="one") == [(4, 48, 64)]
    assert shapes(cfg_batch="two") == [(2, 48, 64)] * 2
    assert shapes(guidance=1.0) == [(2, 48, 64)]


def test_guidance_1_needs_no_negative(prior, golden):
    out = sample_prior(prior, golden["cond"], guidance=1.0, noise=golden["noise"])
    assert (out - golden["sampled_cfg1"]).abs().max() < 2e-5


def test_guidance_0_follows_the_negative_alone(prior, golden):
    out = sample_prior(prior, golden["cond"], golden["negative"], guidance=0.0, noise=golden["noise"])
    white = sample_prior(prior, golden["negative"], guidance=1.0, noise=golden["noise"])
    assert torch.allclose(out, white, atol=1e-5)


def test_cond_and_negative_of_different_slot_counts_run_in_two_forwards(prior, golden):
    short = golden["negative"][:, :16]
    call = {"steps": 2, "noise": golden["noise"]}
    seen = forwards(prior, lambda: sample_prior(prior, golden["cond"], short, **call))
    assert sorted(seen) == [(2, 16, 64)] * 2 + [(2, 48, 64)] * 2
    with pytest.raises(PitError, match="got 48 and 16 tokens"):
        sample_prior(prior, golden["cond"], short, cfg_batch="one", **call)


@pytest.mark.parametrize("slots", [1, 2, 7, 12])
def test_any_number_of_parts(prior, slots):
    cond = torch.randn(1, 16 * slots, 64, generator=torch.Generator().manual_seed(slots))
    out = sample_prior(prior, cond, torch.zeros_like(cond), steps=3, seeds=[1])
    assert out.shape == (1, 16, 64) and out.isfinite().all()


def test_every_solver_approaches_the_same_concept(prior, golden):
    def run(steps, name):
        settings = {"guidance": 1.0, "noise": golden["noise"], "solver": name}
        return sample_prior(prior, golden["cond"], steps=steps, **settings)

    exact = run(100, "heun")
    errors = {name: ((run(25, name) - exact).norm() / exact.norm()).item() for name in flow.SOLVERS}
    log.info("25 steps against the exact solution: %s", errors)
    assert errors["euler"] < 0.05
    assert errors["heun"] < 0.005 and errors["ab2"] < 0.005


def test_row_noise_is_each_seeds_own_and_equals_a_run_alone():
    rows = row_noise([7, 8, 7, -3, 2**64 - 1], (16, 64))
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    for i, seed in enumerate([7, 8]):
        alone = torch.randn((1, 16, 64), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(rows[i : i + 1], alone)
        assert torch.equal(rows[i], row_noise([seed], (16, 64))[0])


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_rows_of_a_batch_equal_runs_alone(prior, golden, strength):
    seeds = [11, 12, 13, 14, 15]
    cond = torch.randn(5, 48, 64, generator=torch.Generator().manual_seed(2))
    white = golden["negative"][:1]
    init = {} if strength == 1 else {"init": golden["init"][:1], "strength": strength}
    batch = sample_prior(prior, cond, white, seeds=seeds, **init)
    listed = [torch.Generator().manual_seed(seed) for seed in seeds]
    assert torch.equal(batch, sample_prior(prior, cond, white, generator=listed, **init))
    largest = 0.0
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        alone = sample_prior(prior, cond[i : i + 1], white, generator=generator, **init)
        largest = max(largest, (alone[0] - batch[i]).abs().max().item())
    log.info("row against run alone, strength %s: largest difference %.1e", strength, largest)
    assert largest < 1e-5


def test_one_cond_serves_every_seed(prior, golden):
    out = sample_prior(prior, golden["cond"][:1], golden["negative"][:1], steps=2, seeds=[1, 2, 3])
    assert out.shape == (3, 16, 64)
    assert not torch.allclose(out[0], out[1])


def test_a_row_with_nan_free_inputs_is_untouched_by_its_neighbours(prior, golden):
    quiet, loud = golden["cond"][:1], 50 * golden["cond"][1:]
    white = golden["negative"][:1]
    both = sample_prior(prior, torch.cat([quiet, loud]), white, seeds=[1, 2])
    alone = sample_prior(prior, quiet, white, seeds=[1])
    assert torch.allclose(both[:1], alone, atol=1e-5)


def test_the_global_generator_is_used_only_when_nothing_else_is_given(prior, golden):
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    sample_prior(prior, golden["cond"], golden["negative"], steps=1, seeds=[1, 2])
    sample_prior(prior, golden["cond"], golden["negative"], steps=1, generator=torch.Generator())
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(3)
    a = sample_prior(prior, golden["cond"], golden["negative"], steps=1)
    torch.manual_seed(3)
    assert torch.equal(a, sample_prior(prior, golden["cond"], golden["negative"], steps=1))


def test_strength_0_returns_the_initial_tokens_and_strength_1_forgets_them(prior, golden):
    cond, white, init, noise = (golden[k] for k in ("cond", "negative", "init", "noise"))
    assert torch.equal(sample_prior(prior, cond, white, init=init, strength=0.0, noise=noise), init)
    full = sample_prior(prior, cond, white, init=init, strength=1.0, noise=noise)
    assert torch.equal(full, sample_prior(prior, cond, white, noise=noise))


def test_steps_are_reported_and_a_run_can_be_interrupted(prior, golden):
    seen = []
    call = {"noise": golden["noise"], "init": golden["init"], "strength": 0.6}
    sample_prior(prior, golden["cond"], golden["negative"], callback=lambda *a: seen.append(a[:2]), **call)
    assert seen == [(i + 1, 15) for i in range(15)]

    class StoppedError(Exception):
        pass

    def stop(done, total, x):
        raise StoppedError

    with pytest.raises(StoppedError):
        sample_prior(prior, golden["cond"], golden["negative"], callback=stop, **call)


def test_no_gradients_are_kept_and_inputs_are_left_alone(prior, golden):
    before = {key: golden[key].clone() for key in ("cond", "negative", "noise", "init")}
    call = {"noise": golden["noise"], "init": golden["init"], "strength": 0.5}
    assert not sample_prior(prior, golden["cond"], golden["negative"], **call).requires_grad
    assert all(torch.equal(golden[key], value) for key, value in before.items())


def test_half_precision_prior_takes_float32_tokens_and_the_same_noise(golden, prior):
    half = IPPrior(**prior.config.to_dict(), dtype=torch.bfloat16)
    half.load_state_dict(prior.state_dict())
    out = sample_prior(half, golden["cond"], golden["negative"], noise=golden["noise"])
    assert out.dtype == torch.float32
    assert (out - golden["sampled_cfg2"]).norm() / golden["sampled_cfg2"].norm() < 0.02


def test_half_precision_tokens_are_taken_too(prior, golden):
    out = sample_prior(prior, golden["cond"].half(), golden["negative"].half(), noise=golden["noise"].half())
    assert out.dtype == torch.float32
    assert (out - golden["sampled_cfg2"]).abs().max() < 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least 1 step, got 0"),
        ({"steps": 2.0}, "at least 1 step, got 2.0"),
        ({"guidance": NAN}, "finite guidance .* got nan"),
        ({"guidance": float("inf")}, "finite guidance .* got inf"),
        ({"strength": 1.5}, "strength from 0 .* got 1.5"),
        ({"strength": NAN}, "strength from 0 .* got nan"),
        ({"strength": 0.5}, "Strength 0.5 needs initial tokens"),
        ({"solver": "rk4"}, "euler, heun, ab2, got 'rk4'"),
        ({"cfg_batch": "three"}, "'auto', 'one' or 'two', got 'three'"),
        ({"noise": torch.zeros(2, 16, 63)}, r"noise of shape \(B, 16, 64\), got \(2, 16, 63\)"),
        ({"noise": torch.zeros(16, 64)}, r"noise of shape \(B, 16, 64\), got \(16, 64\)"),
        ({"noise": torch.zeros(3, 16, 64)}, "one size .* cond 2, negative 2, noise 3"),
        ({"init": torch.zeros(2, 32, 64)}, r"init of shape \(B, 16, 64\), got \(2, 32, 64\)"),
        ({"init": torch.full((2, 16, 64), NAN)}, "init tokens hold NaN"),
        ({"seeds": [1]}, "one seed or generator per row, got 1"),
        ({"seeds": []}, "one seed or generator per row, got 0"),
        ({"seeds": [1, 2, 3]}, "one seed or generator per row, got 3"),
        ({"seeds": [1, 2.5]}, "seed .* got 2.5"),
        ({"seeds": [1, 2**64]}, "seed .* got 18446744073709551616"),
        ({"generator": [torch.Generator()]}, "one seed or generator per row, got 1"),
        ({"seeds": [1, 2], "noise": torch.zeros(2, 16, 64)}, "one source of noise"),
    ],
)
def test_bad_settings_are_named(prior, golden, settings, message):
    with pytest.raises(PitError, match=message):
        sample_prior(prior, golden["cond"], golden["negative"], **settings)


@pytest.mark.parametrize("shape", [(2, 47, 64), (2, 0, 64), (2, 48, 32), (48, 64), (0, 48, 64)])
def test_tokens_of_another_shape_are_named(prior, golden, shape):
    expected = r"tokens of shape \(B, 16 \* slots, 64\) for this prior, got"
    with pytest.raises(PitError, match="cond " + expected):
        sample_prior(prior, torch.zeros(shape), golden["negative"])
    with pytest.raises(PitError, match="negative " + expected):
        sample_prior(prior, golden["cond"], torch.zeros(shape))


def test_tokens_with_nan_and_a_forgotten_negative_are_named(prior, golden):
    broken = golden["cond"].clone()
    broken[1, 3, 5] = NAN
    with pytest.raises(PitError, match="cond tokens hold NaN"):
        sample_prior(prior, broken, golden["negative"])
    with pytest.raises(PitError, match="needs negative tokens"):
        sample_prior(prior, golden["cond"])


def marked(value):
    return torch.full((16, 8), float(value))


def slot_values(tokens):
    return tokens[:, ::16, 0].tolist()


@pytest.mark.parametrize(
    ("parts", "reference", "use_ref", "expected"),
    [
        ([], None, False, [0, 0, 0]),
        ([1], None, False, [1, 0, 0]),
        ([1, 2, 3], None, False, [1, 2, 3]),
        ([1, 2, 3, 4, 5], None, False, [1, 2, 3, 4, 5]),
        ([], None, True, [0, 0, 0]),
        ([1], None, True, [0, 1, 0]),
        ([1, 2], 9, True, [9, 1, 2]),
        ([1, 2, 3], None, True, [0, 1, 2, 3]),
        ([1, 2, 3, 4, 5, 6, 7], 9, True, [9, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_slots_are_assembled_as_in_training(parts, reference, use_ref, expected):
    reference = None if reference is None else marked(reference)
    cond, negative = assemble([marked(p) for p in parts], marked(0), Slots(use_ref), reference)
    assert slot_values(cond) == [expected]
    assert negative.shape == cond.shape and not negative.any()


def test_batched_tokens_are_assembled_row_by_row():
    two = torch.stack([marked(1), marked(2)])
    cond, negative = assemble([two, marked(3)], marked(0), Slots(), None)
    assert slot_values(cond) == [[1, 3, 0], [2, 3, 0]]
    assert negative.shape == (2, 48, 8)


def test_what_does_not_fit_a_slot_is_named():
    with pytest.raises(PitError, match=r"part 2 .* \(16, 8\), got \(4, 8\)"):
        assemble([marked(1), torch.zeros(4, 8)], marked(0), Slots())
    with pytest.raises(PitError, match="without a reference slot"):
        assemble([marked(1)], marked(0), Slots(use_ref=False), marked(2))
    with pytest.raises(PitError, match="the reference as"):
        assemble([marked(1)], marked(0), Slots(use_ref=True), torch.zeros(1, 1, 16, 8))
    with pytest.raises(PitError, match=r"one size .* \[2, 3, 1\]"):
        assemble([torch.zeros(2, 16, 8), torch.zeros(3, 16, 8)], marked(0), Slots())
