"""An IP-LoRA's changes of the IP-Adapter's own layers."""

import pytest
import torch
from lora_files import LAYOUTS, SDXL_CSV, lora_file, lora_key, sdxl_shapes

from pit_core.errors import PitError
from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
from pit_core.ip_adapter.resampler import ImageProjection
from pit_core.lora.formats import lora_from_tensors
from pit_core.lora.ip_deltas import apply_ip_deltas, ip_layers

SDXL_IP = sdxl_shapes(shrink=32, ip=True)
CONTEXT = 64


def adapter(widths=None, context=CONTEXT):
    """SDXL's 70 layers at 1/32 of their width, in the adapter's order, which is the golden table's."""
    torch.manual_seed(0)
    widths = widths or [shape[0] for name, shape in SDXL_IP.items() if name.endswith("to_k_ip")]
    built = IPAdapter(ImageProjection(8, context, 2), IPLayers(widths, context), "'a.bin'", "hash")
    return built.eval().requires_grad_(False)


def by_golden_table():
    """Key of the adapter -> module, as the golden table pairs them."""
    rows = [line.split(",") for line in SDXL_CSV.read_text().splitlines()[1:]]
    return {
        f"ip_adapter.{row[7]}.{name}.weight": f"{row[1]}.{name}"
        for row in rows
        if row[7]
        for name in ("to_k_ip", "to_v_ip")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_of_the_adapter_becomes_w_plus_s_b_a(layout):
    before, file = adapter(), lora_file(SDXL_IP, layout=layout)
    file = dict(reversed(file.items()))  # the order in the file means nothing
    after = apply_ip_deltas(before, file, strength=0.5)
    old, new, golden = before.state_dict(), after.state_dict(), by_golden_table()
    assert len(golden) == 140
    for key, module in golden.items():
        down, up = file[lora_key(module, "down", layout)], file[lora_key(module, "up", layout)]
        expected = old[key].double() + 0.5 * up.double() @ down.double()
        assert (new[key] - expected).abs().max() < 1e-6
        assert not torch.equal(new[key], old[key])
    assert {key for key in old if not torch.equal(old[key], new[key])} == set(golden)


def test_the_old_adapter_stays_and_the_new_one_is_another_to_caches():
    before = adapter()
    copy = {key: tensor.clone() for key, tensor in before.state_dict().items()}
    once, half = (apply_ip_deltas(before, lora_file(SDXL_IP), s) for s in (1.0, 0.5))
    assert all(torch.equal(tensor, copy[key]) for key, tensor in before.state_dict().items())
    assert len({before.content_hash, once.content_hash, half.content_hash}) == 3
    assert once.content_hash == apply_ip_deltas(before, lora_file(SDXL_IP)).content_hash
    assert once.projector is before.projector and not once.training
    assert not any(p.requires_grad for p in once.parameters())
    assert once.name == "'a.bin' with This LoRA"


def test_half_precision_adapters_stay_so():
    after = apply_ip_deltas(adapter().half(), lora_file(SDXL_IP))
    assert {p.dtype for p in after.parameters()} == {torch.float16}


def test_layers_of_the_unet_are_left_alone():
    found = ip_layers(adapter(), lora_file(SDXL_IP))
    assert found.keys() == by_golden_table().keys()
    assert {key: layer.module for key, layer in found.items()} == by_golden_table()


@pytest.mark.parametrize(
    ("built", "dropped", "expected"),
    [
        (adapter(), "_ip.", "changes 0 of the IP-Adapter's own layers .* but 'a.bin' has 140"),
        (adapter(), "mid_block.attentions.0.transformer_blocks.9.attn2.to_v_ip", "changes 139 of"),
        (adapter([20, 40]), "-", "changes 140 of .* but 'a.bin' has 4"),
        (adapter(context=32), "-", r"as a weight of shape \(20, 64\), but in 'a.bin' it is \(20, 32\)"),
        (adapter([20] * 70), "-", r"down_blocks.2.*of shape \(40, 64\), but in 'a.bin' it is \(20, 64\)"),
    ],
)
def test_an_adapter_of_another_kind_is_refused(built, dropped, expected):
    file = {key: tensor for key, tensor in lora_file(SDXL_IP).items() if dropped not in key}
    with pytest.raises(PitError, match=expected):
        apply_ip_deltas(built, lora_from_tensors(file, name="x.safetensors"))


def test_strength_is_a_number():
    with pytest.raises(PitError, match="strength to be a finite number"):
        apply_ip_deltas(adapter(), lora_file(SDXL_IP), float("inf"))
