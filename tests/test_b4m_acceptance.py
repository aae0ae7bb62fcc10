"""What B4M has to show, one test for each; the node's own are in nodes/test_b4m_nodes.py."""

import copy

import pytest
import torch
from b4m_files import WIDTHS, b4m_file, fill, predict, quadrants_of
from lora_files import lora_key, sdxl_shapes, unet_shapes
from tiny_stack import unet as tiny_unet
from torch import Tensor

from pit_core.b4m.dials import Dials, Source, load_source
from pit_core.b4m.factors import factors_of, load_factors, save_factors
from pit_core.b4m.merge import quadrant_lora, splice
from pit_core.b4m.projection import SplitAdapter
from pit_core.b4m.riemannian import RiemannianAdamW
from pit_core.files import load_tensors, save_tensors
from pit_core.lora.formats import lora_from_tensors, match_report, patched_weights, save_lora
from pit_core.lora.placing import place_lora

SDXL = sdxl_shapes()
LAYOUTS = {"bare": 0, "released": 1, "b4m": 2}
"""Layout -> how many `unet.` stand before a key."""


def test_1_all_560_layers_of_the_full_size_map_are_reached(tmp_path) -> None:
    """A file of the published layout: 1120 tensors behind a doubled prefix, no alpha."""
    published = b4m_file(1, shapes=SDXL, rank=2)
    assert len(published) == 1120 and all(key.startswith("unet.unet.") for key in published)
    report = match_report(published, SDXL)
    assert (len(report.matched), report.unmatched, report.kind) == (560, (), "B4M")
    source = Source(lora_from_tensors(published), lora_from_tensors(b4m_file(2, shapes=SDXL, rank=2)))
    dialled = source.dialled(Dials(0.5))
    placed = place_lora(source.lora(dialled.factors, dialled.method), SDXL)
    assert (len(placed.model), placed.left) == (560, ())
    save_lora(tmp_path / "joined.safetensors", source.saved(dialled, Dials(0.5)))
    saved, _ = load_tensors(tmp_path / "joined.safetensors")
    assert len(saved) == 3 * 560 and all(key.startswith("lora_unet_") for key in saved)
    assert all(float(tensor) == 2 for key, tensor in saved.items() if key.endswith(".alpha"))
    assert len(match_report(saved, SDXL).matched) == 560


def test_2_spliced_quadrants_are_the_parents_blocks() -> None:
    content, style = b4m_file(1), b4m_file(2)
    spliced, c, s = splice(content, style), factors_of(content), factors_of(style)
    assert spliced.keys() == c.keys()
    for name, layer in spliced.items():
        ul, ur, dl, dr = quadrants_of(layer.delta())
        of_content, of_style = quadrants_of(c[name].delta()), quadrants_of(s[name].delta())
        assert torch.equal(ul, of_content[0]) and torch.equal(ul, of_style[0])
        assert torch.equal(ur, of_content[1])
        assert torch.equal(dl, of_style[2])
        assert torch.equal(dr, s[name].halves().b @ c[name].halves().d)


def test_3_four_gains_of_one_are_the_lora_itself() -> None:
    factors = factors_of(b4m_file(1))
    for name, layer in quadrant_lora(factors).items():
        assert layer.rank == 2 * factors[name].rank
        assert torch.equal(layer.delta(), factors[name].delta())
    for name, layer in Source(lora_from_tensors(b4m_file(1))).dialled(Dials()).factors.items():
        assert torch.equal(layer.delta(), factors[name].delta())


def test_4_gains_of_zero_leave_the_model_unchanged() -> None:
    unet = tiny_unet()
    shapes = unet_shapes(unet)
    weights = {name: unet.get_submodule(name).weight for name in shapes}
    file = {key: tensor / 3 for key, tensor in b4m_file(1, shapes=shapes).items()}
    source = Source(lora_from_tensors(file))
    four = quadrant_lora(file, gains=(0, 0, 0, 0))
    found = patched_weights(weights, source.lora(four, "entity"))
    assert len(found) == len(weights)
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert source.dialled(Dials(0, 0, 0)).factors == {}


def test_5_prefixes_make_identical_patches() -> None:
    weights = {module: torch.ones(shape) for module, shape in WIDTHS.items()}
    found = []
    for layout, prefixes in LAYOUTS.items():
        file = b4m_file(1, layout=layout)
        assert all(key.startswith("unet." * prefixes) for key in file)
        source = Source(lora_from_tensors(file))
        dialled = source.dialled(Dials(0.3, 2, -1))
        found.append(patched_weights(weights, source.lora(dialled.factors, "entity")))
    for other in found[1:]:
        assert all(torch.equal(other[module], patched) for module, patched in found[0].items())


def test_6_weights_survive_saving_loading_and_splicing_bit_for_bit(tmp_path) -> None:
    content, style = ({k: t / 3 for k, t in b4m_file(seed).items()} for seed in (1, 2))
    save_tensors(tmp_path / "content.safetensors", content)
    save_factors(tmp_path / "style.safetensors", factors_of(style), {"basis_seed": 0})
    (c, _), (s, metadata) = (load_factors(tmp_path / f"{n}.safetensors") for n in ("content", "style"))
    assert metadata == {"basis_seed": "0"}
    loaded = load_source(tmp_path / "content.safetensors", tmp_path / "style.safetensors")
    for spliced in (splice(c, s), loaded.dialled(Dials()).factors):
        for module in WIDTHS:
            name = "lora_unet_" + module.replace(".", "_")
            assert torch.equal(spliced[name].down, content[lora_key(module, "down", "b4m")])
            assert torch.equal(spliced[name].up, style[lora_key(module, "up", "b4m")])


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_7_one_preconditioned_step_moves_b_and_d_by_the_formulas(absolute: bool) -> None:
    unet = tiny_unet().requires_grad_(False)
    adapter = SplitAdapter.new(unet, rank=4)
    fill(adapter)
    before = copy.deepcopy(adapter)
    optimizer = RiemannianAdamW(
        pairs=adapter.pairs(), lr=0.01, weight_decay=0.1, damping=0.1, relative=not absolute
    )
    with adapter.attached(unet):
        predict(unet).square().mean().backward()
    optimizer.step()
    for name, layer in adapter.projections.items():
        old = before.projections[name]
        down, up = (factor.detach() for factor in old.factors())
        for new, then, gradient in (
            (layer.b, old.b, layer.b.grad @ damped_inverse(down @ down.T, absolute)),
            (layer.d, old.d, damped_inverse(up.T @ up, absolute) @ layer.d.grad),
        ):
            # Adam's first step: both moments are the gradient's own
            expected = (then - 0.01 * gradient / (gradient.abs() + 1e-8)) * (1 - 0.01 * 0.1)
            torch.testing.assert_close(new, expected, rtol=1e-3, atol=1e-4)
            assert not torch.equal(new, then)
        assert torch.equal(layer.a, old.a) and torch.equal(layer.c, old.c)


def damped_inverse(gram: Tensor, absolute: bool) -> Tensor:
    delta = 0.1 * (1 if absolute else gram.trace() / len(gram))
    return torch.linalg.inv(gram + delta * torch.eye(len(gram)))
