"""Flux's weights under diffusers' names and under the published ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pit_core.diptych.flux_keys import to_diffusers, to_published
from pit_core.errors import PitError

PUBLISHED = {
    "img_in.weight": (3072, 384),
    "txt_in.bias": (3072,),
    "time_in.in_layer.weight": (3072, 256),
    "guidance_in.out_layer.bias": (3072,),
    "vector_in.in_layer.weight": (3072, 768),
    "double_blocks.18.img_attn.qkv.weight": (9216, 3072),
    "double_blocks.0.txt_attn.qkv.bias": (9216,),
    "double_blocks.7.txt_attn.norm.key_norm.scale": (128,),
    "double_blocks.0.img_mod.lin.weight": (18432, 3072),
    "double_blocks.0.txt_mlp.2.weight": (3072, 12288),
    "single_blocks.37.linear1.weight": (21504, 3072),
    "single_blocks.37.linear2.weight": (3072, 15360),
    "single_blocks.0.norm.query_norm.scale": (128,),
    "single_blocks.0.modulation.lin.bias": (9216,),
    "final_layer.adaLN_modulation.1.weight": (6144, 3072),
    "final_layer.linear.weight": (64, 3072),
}
"""Some of the released Flux Fill's 780 weights and their shapes."""


def model(**sizes: object) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(**sizes)


def tiny(guidance: bool = True) -> dict[str, Tensor]:
    return model(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=6,
        num_attention_heads=2,
        joint_attention_dim=5,
        pooled_projection_dim=7,
        guidance_embeds=guidance,
        axes_dims_rope=(2, 2, 2),
    ).state_dict()


def test_full_size_names_both_ways() -> None:
    with torch.device("meta"):
        theirs = model(in_channels=384, out_channels=64, guidance_embeds=True).state_dict()
    published = to_published(theirs)
    assert len(published) == 780
    assert {key: tuple(published[key].shape) for key in PUBLISHED} == PUBLISHED
    back = to_diffusers(published)
    assert {key: t.shape for key, t in back.items()} == {key: t.shape for key, t in theirs.items()}


@pytest.mark.parametrize("guidance", [True, False])
def test_numbers_come_back_as_they_were(guidance: bool) -> None:
    theirs = tiny(guidance)
    published = to_published(theirs)
    assert ("guidance_in.in_layer.weight" in published) == guidance
    back = to_diffusers(published)
    assert back.keys() == theirs.keys() and all(torch.equal(back[key], theirs[key]) for key in theirs)


def test_fused_weights_are_in_order_and_the_last_modulation_is_turned_round() -> None:
    theirs = tiny()
    published = to_published(theirs)
    block = "single_transformer_blocks.2"
    fused = [theirs[f"{block}.{name}.bias"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert torch.equal(published["single_blocks.2.linear1.bias"], torch.cat(fused))
    scale, shift = theirs["norm_out.linear.bias"].chunk(2)
    assert torch.equal(published["final_layer.adaLN_modulation.1.bias"], torch.cat([shift, scale]))


def test_what_is_not_a_whole_flux_model_is_refused() -> None:
    lacking = tiny()
    del lacking["transformer_blocks.1.attn.add_k_proj.bias"]
    with pytest.raises(PitError, match=r"1 are missing \(transformer_blocks.1.attn.add_k_proj.bias\)"):
        to_published(lacking)
    with pytest.raises(PitError, match=r"1 unknown \(lora\)"):
        to_published({**tiny(), "lora": torch.zeros(1)})
    with pytest.raises(PitError, match="not the weights of a Flux model"):
        to_diffusers({"img_in.weight": torch.zeros(4, 4)})
