"""Sampling the prior in ComfyUI: the library's numbers, progress, and the stop button."""

from typing import Any

import host_double
import pytest
import torch
from benches import CONTEXT, TOKENS, Bench, DoubleBench


@pytest.fixture
def prior(bench: Bench) -> Any:
    return bench.first("PiTLoadPrior", file=bench.prior_file(use_ref=True, max_crops=7, sketch_prob=0.5))


def test_the_loader_reports_how_a_prior_was_trained(bench: Bench) -> None:
    report = bench.run("PiTLoadPrior", file=bench.prior_file(use_ref=True, max_crops=7, sketch_prob=0.5))[1]
    assert "up to 7 parts, with a reference slot, 50% sketches" in report


def test_changed_settings_are_read_again(bench: Bench) -> None:
    """Those beside the file, by its own name or as cfg.yaml."""
    node, name = bench.pack.NODE_CLASS_MAPPINGS["PiTLoadPrior"], bench.prior_file("prior.ckpt")
    seen = [node.fingerprint_inputs(file=name)]
    for settings in ("cfg.yaml", "prior.yaml"):
        (bench.folder / "models/ip_prior" / settings).write_text("a: 1", "utf-8")
        seen.append(node.fingerprint_inputs(file=name))
        (bench.folder / "models/ip_prior" / settings).write_text("a: 12", "utf-8")
        seen.append(node.fingerprint_inputs(file=name))
    assert len(set(seen)) == 5 and seen[-1] == node.fingerprint_inputs(file=name)


def test_samples_are_those_of_the_library(bench: Bench, prior: Any) -> None:
    sample = bench.part("pit_core.ip_prior.sample")
    path = bench.folder / "models/ip_prior" / bench.prior_file(use_ref=True)
    plain, info = bench.part("pit_core.ip_prior.checkpoint").load_prior(path)
    parts = bench.tokens(1, rows=2)
    cond, negative = sample.assemble(list(parts.tokens), parts.white[0], info)
    expected = sample.sample_prior(plain, cond, negative, steps=3, guidance=2.5, seeds=[5, 6], solver="heun")
    options = {"count": 2, "steps": 3, "guidance": 2.5, "solver": "heun", "seed": 5}
    found = bench.first("PiTSamplePrior", prior=prior, parts=parts, **options)
    assert found.tokens.shape == (2, TOKENS, CONTEXT)
    assert torch.allclose(found.tokens, expected, atol=1e-5)
    assert found.null is parts.null or torch.equal(found.null, parts.null)


def test_a_concept_depends_on_its_own_seed_alone(bench: Bench, prior: Any) -> None:
    inputs = {"prior": prior, "parts": bench.tokens(1), "steps": 2}
    many = bench.first("PiTSamplePrior", **inputs, count=34, seed=2**64 - 2).tokens
    for i, seed in ((0, 2**64 - 2), (2, 0), (33, 31)):
        one = bench.first("PiTSamplePrior", **inputs, count=1, seed=seed).tokens
        assert torch.allclose(many[i : i + 1], one, atol=1e-5)


def test_an_initial_concept_is_kept_at_strength_zero(bench: Bench, prior: Any) -> None:
    inputs = {"prior": prior, "parts": bench.tokens(1), "initial": bench.tokens(4), "steps": 4}
    same = bench.first("PiTSamplePrior", **inputs, strength=0.0, count=2).tokens
    assert torch.equal(same, bench.tokens(4).tokens.expand(2, -1, -1))
    some = bench.first("PiTSamplePrior", **inputs, strength=0.5).tokens
    assert not torch.allclose(some, bench.first("PiTSamplePrior", **inputs).tokens)


def test_the_reference_fills_its_slot(bench: Bench, prior: Any) -> None:
    parts = bench.tokens(1)
    with_reference = bench.tokens(1, reference=bench.tokens(3).tokens)
    a, b = (
        bench.first("PiTSamplePrior", prior=prior, parts=each, steps=2) for each in (parts, with_reference)
    )
    assert not torch.allclose(a.tokens, b.tokens)


def test_progress_and_the_stop_button(double: DoubleBench, prior: Any) -> None:
    double.state.progress.clear()
    inputs = {"prior": prior, "parts": double.tokens(1)}
    double.first("PiTSamplePrior", **inputs, steps=3, count=40)
    assert double.state.progress == [(i, 6) for i in range(1, 7)]
    double.state.interrupted = True
    try:
        with pytest.raises(host_double.InterruptedRunError):
            double.first("PiTSamplePrior", **inputs)
    finally:
        double.state.interrupted = False
    assert len(double.state.progress) == 6
    double.first("PiTSamplePrior", **inputs, steps=1)


def test_from_parts_to_a_picture(bench: Bench, prior: Any) -> None:
    """The main job as a graph: encode parts, sample the prior, apply, sample."""
    models = {"ip_adapter": bench.adapter(), "clip_vision": bench.clip_vision()}
    part = torch.rand(1, 20, 30, 3, generator=torch.Generator().manual_seed(1))
    parts = bench.first("PiTEncodeParts", **models, parts={"part0": part})
    concepts = bench.first("PiTSamplePrior", prior=prior, parts=parts, count=2, steps=2)
    model = bench.model()
    patched = bench.first("PiTApplyTokens", model=model, ip_adapter=models["ip_adapter"], tokens=concepts)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    found = bench.sample(patched, noise=noise)
    assert torch.isfinite(found).all() and not torch.equal(found, bench.sample(model, noise=noise))
