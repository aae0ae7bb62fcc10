"""Partly learnable projections on real UNets of two plans."""

import copy

import pytest
import tiny_stack
import torch
from b4m_files import fill, predict
from torch import nn

from pit_core.b4m.merge import splice
from pit_core.b4m.projection import SplitAdapter, attention_linears
from pit_core.errors import PitError


class Plan(nn.Module):
    """Another plan: odd widths, and modules that must stay out of it."""

    def __init__(self):
        super().__init__()
        self.attn1 = nn.ModuleDict(
            {"to_q": nn.Linear(9, 7), "to_k": nn.Linear(6, 7), "to_v": nn.Linear(6, 7)}
        )
        self.attn1["to_out"] = nn.ModuleList([nn.Linear(7, 9), nn.Dropout()])
        self.attn3 = nn.ModuleDict({"to_q": nn.Linear(9, 7)})
        self.proj = nn.Linear(9, 9)

    def forward(self, x):
        return self.attn1["to_out"][0](self.attn1["to_q"](x))


@pytest.fixture
def unet():
    return tiny_stack.unet().requires_grad_(False)


def test_targets_are_the_attention_linears_of_any_plan(unet):
    blocks = sum(name.endswith(("attn1", "attn2")) for name, _ in unet.named_modules())
    assert len(attention_linears(unet)) == 4 * blocks > 0
    assert set(attention_linears(Plan())) == {"attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"}
    with pytest.raises(PitError, match="attn1"):
        attention_linears(nn.Linear(2, 2))


@pytest.mark.parametrize("rank", [2, 5, 6])
def test_the_start_is_zero_with_an_orthonormal_prior(rank):
    adapter = SplitAdapter.new(Plan(), rank=rank, seed=3)
    for layer in adapter.projections.values():
        assert not layer.factors().delta().any()
        frozen = torch.cat([layer.a, layer.c.T])
        torch.testing.assert_close(frozen.T @ frozen, torch.eye(rank), rtol=0, atol=1e-6)


def test_a_new_adapter_leaves_the_prediction_and_still_gets_gradients(unet):
    before = predict(unet)
    adapter = SplitAdapter.new(unet, rank=4)
    with adapter.attached(unet):
        during = predict(unet)
        during.square().mean().backward()
    assert torch.equal(during, before)
    assert all(p.grad.any() for p in [*adapter.content, *adapter.style])


def test_attached_predicts_as_weights_with_delta_and_leaves_no_trace(unet):
    before = predict(unet.double())
    adapter = SplitAdapter.new(unet, rank=4).double()
    fill(adapter)
    with adapter.attached(unet):
        attached = predict(unet)
    baked = copy.deepcopy(unet)
    for path, linear in attention_linears(baked).items():
        linear.weight += adapter.factors()[f"lora_unet_{path.replace('.', '_')}"].delta()
    torch.testing.assert_close(attached, predict(baked), rtol=1e-9, atol=1e-10)
    assert (attached - before).abs().max() > 1e-3
    assert torch.equal(predict(unet), before)


def test_frozen_halves_are_buffers_and_belong_to_seed_and_rank():
    adapter = SplitAdapter.new(Plan(), rank=4, seed=1)
    assert {name.rsplit(".")[-1] for name, _ in adapter.named_parameters()} == {"b", "d"}
    assert {name.rsplit(".")[-1] for name, _ in adapter.named_buffers()} == {"a", "c"}
    again, other = SplitAdapter.new(Plan(), rank=4, seed=1), SplitAdapter.new(Plan(), rank=4, seed=2)
    fill(again)
    assert again.metadata() == adapter.metadata()
    assert adapter.metadata()["basis_seed"] == "1" and adapter.metadata()["rank"] == "4"
    assert other.metadata()["basis_hash"] != adapter.metadata()["basis_hash"]


def test_factors_come_back_bit_for_bit_after_a_splice():
    content, style = (SplitAdapter.new(Plan(), rank=4) for _ in range(2))
    fill(content, 1), fill(style, 2)
    joined = SplitAdapter(splice(content.factors(), style.factors()))
    for name, (down, up) in joined.factors().items():
        assert torch.equal(down, content.factors()[name].down)
        assert torch.equal(up, style.factors()[name].up)


def test_what_does_not_fit_is_named(unet):
    with pytest.raises(PitError, match="Rank 7.*from 2 to 6"):
        SplitAdapter.new(Plan(), rank=7)
    adapter = SplitAdapter.new(Plan(), rank=4)
    with pytest.raises(PitError, match="no layer"), adapter.attached(unet):
        pass
    wide = Plan()
    wide.attn1["to_q"] = nn.Linear(9, 8)
    with pytest.raises(PitError, match="maps 9 to 7"), adapter.attached(wide):
        pass
