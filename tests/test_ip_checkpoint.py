"""IP-Adapter files: both layouts, detection by shape, and what is said about other files."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pit_core.errors import PitError
from pit_core.files import load_tensors
from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
from pit_core.ip_adapter.checkpoint import (
    check_encoder,
    check_family,
    describe_adapter,
    load_ip_adapter,
    matching_encoder,
    save_ip_adapter,
)
from pit_core.ip_adapter.layers import layers_of_config
from pit_core.ip_adapter.resampler import ImageProjection, Resampler

SD15 = layers_of_config({})  # diffusers' default config is SD1.5's plan, but for the text width
SDXL = layers_of_config(
    {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
    }
)


def plus(dim_head=64, seed=0, embedding_dim=24):
    torch.manual_seed(seed)
    projector = Resampler(128, 2, dim_head, 128 // dim_head, 5, embedding_dim, 40, 2)
    return IPAdapter(projector, IPLayers([16, 16, 32], 40))


def base(embedding_dim=24):
    torch.manual_seed(0)
    return IPAdapter(ImageProjection(embedding_dim, 40, 4), IPLayers([16, 32], 40))


def nested(adapter):
    return {
        part: {k.split(".", 1)[1]: v for k, v in adapter.state_dict().items() if k.startswith(part)}
        for part in ("image_proj", "ip_adapter")
    }


def on_meta(kind, width, tokens, layers):
    context = layers[0].context
    with torch.device("meta"):
        projector = (
            Resampler(64, 1, 64, 1, tokens, width, context)
            if kind == "plus"
            else ImageProjection(width, context, tokens)
        )
        return IPAdapter(projector, IPLayers([layer.width for layer in layers], context), "'x.bin'")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# reading


@pytest.mark.parametrize("make", [plus, base])
def test_nested_bin_and_flat_safetensors_are_the_same_adapter(tmp_path, make):
    adapter = make()
    torch.save(nested(adapter), tmp_path / "a.bin")
    save_file(adapter.state_dict(), tmp_path / "a.safetensors")
    one, two = load_ip_adapter(tmp_path / "a.bin"), load_ip_adapter(tmp_path / "a.safetensors")
    assert same(one.state_dict(), adapter.state_dict()) and same(two.state_dict(), adapter.state_dict())
    assert one.content_hash == two.content_hash != ""
    assert one.kind == adapter.kind and one.num_tokens == adapter.num_tokens
    assert one.projector.config == adapter.projector.config
    assert not one.training and not any(p.requires_grad for p in one.parameters())
    features = torch.randn(2, 7, 24) if adapter.kind == "plus" else torch.randn(2, 24)
    assert torch.equal(one(features), adapter(features))


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k.replace("ip_adapter.", "adapter_modules."),
        lambda k: k.replace("ip_adapter.", "adapter_modules.").replace("image_proj.", "image_proj_model."),
        lambda k: "module." + k.replace("image_proj.", "image_proj_model."),
        lambda k: "state_dict." + k,
    ],
)
def test_training_layouts_are_understood(tmp_path, rename):
    adapter = plus()
    tensors = {rename(k): v for k, v in adapter.state_dict().items()}
    if "module." in next(iter(tensors)):
        tensors["module.unet.conv_in.weight"] = torch.zeros(3)
    save_file(tensors, tmp_path / "pytorch_model.safetensors")
    assert same(load_ip_adapter(tmp_path / "pytorch_model.safetensors").state_dict(), adapter.state_dict())


def test_saving_and_loading_keeps_everything_also_the_head_count(tmp_path):
    adapter = plus(dim_head=16)
    save_ip_adapter(tmp_path / "new" / "a.safetensors", adapter, {"step": 3})
    again = load_ip_adapter(tmp_path / "new" / "a.safetensors")
    assert again.projector.config == adapter.projector.config
    features = torch.randn(1, 7, 24)
    assert torch.equal(again(features), adapter(features))
    _, metadata = load_tensors(tmp_path / "new" / "a.safetensors")
    assert metadata["step"] == "3" and '"dim_head": 16' in metadata["pit_config"]


def test_head_width_is_64_where_no_metadata_says_otherwise(tmp_path):
    save_file(plus(dim_head=16).state_dict(), tmp_path / "a.safetensors")
    assert load_ip_adapter(tmp_path / "a.safetensors").projector.config["heads"] == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_are_kept_or_converted(tmp_path, dtype):
    save_ip_adapter(tmp_path / "a.safetensors", plus(), dtype=dtype)
    kept = load_ip_adapter(tmp_path / "a.safetensors")
    assert {p.dtype for p in kept.parameters()} == {dtype}
    assert kept(torch.randn(1, 7, 24)).dtype == torch.float32
    wide = load_ip_adapter(tmp_path / "a.safetensors", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert kept.content_hash == wide.content_hash


def test_eight_bit_floats_become_fp16(tmp_path):
    tensors = {k: v.to(torch.float8_e4m3fn) for k, v in plus().state_dict().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert {p.dtype for p in load_ip_adapter(tmp_path / "a.safetensors").parameters()} == {torch.float16}


def test_layers_come_from_the_operations_namespace(tmp_path):
    class Operations:
        class Linear(nn.Linear):
            pass

        class LayerNorm(nn.LayerNorm):
            pass

    save_ip_adapter(tmp_path / "a.safetensors", plus())
    adapter = load_ip_adapter(tmp_path / "a.safetensors", operations=Operations, dtype=torch.float16)
    layers = [m for m in adapter.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    assert all(type(m) in (Operations.Linear, Operations.LayerNorm) for m in layers)
    assert {p.dtype for p in adapter.parameters()} == {torch.float16}
    assert torch.equal(adapter.layers["5"].to_v_ip.weight, plus().layers["5"].to_v_ip.weight.half())


def test_family_and_token_count_are_told_by_shape():
    assert on_meta("plus", 1280, 16, SDXL).family == "sdxl"
    assert on_meta("base", 1024, 4, layers_of_config({"cross_attention_dim": 768})).family == "sd15"
    assert on_meta("base", 1024, 4, SD15).family == "other"
    assert describe_adapter(on_meta("plus", 1280, 16, SDXL)) == (
        "IP-Adapter Plus, 16 tokens, for SDXL (70 layers, text width 2048), reads CLIP ViT-H/14"
    )


# encoder and family


def test_plus_wants_the_hidden_width_and_base_the_projection_width():
    plus_h, base_h, base_g = (
        on_meta(k, w, 4, SDXL) for k, w in (("plus", 1280), ("base", 1024), ("base", 1280))
    )
    for adapter, widths in ((plus_h, (1280, 1024)), (base_h, (1280, 1024)), (base_g, (1664, 1280))):
        check_encoder(adapter, *widths)
    assert matching_encoder(plus_h) == matching_encoder(base_h) == "CLIP ViT-H/14"
    assert matching_encoder(base_g) == "CLIP ViT-bigG/14"


def test_a_wrong_encoder_is_told_apart_even_where_two_widths_coincide():
    plus_h, base_h, base_g = (
        on_meta(k, w, 4, SDXL) for k, w in (("plus", 1280), ("base", 1024), ("base", 1280))
    )
    with pytest.raises(
        PitError, match=r"width 1280, which CLIP ViT-H/14 makes.*bigG/14 \(hidden .* width 1664\)"
    ):
        check_encoder(plus_h, 1664, 1280)
    with pytest.raises(
        PitError, match=r"width 1280, which CLIP ViT-bigG/14 makes.*ViT-H/14 \(.* width 1024\)"
    ):
        check_encoder(base_g, 1280, 1024)
    with pytest.raises(PitError, match="which CLIP ViT-H/14 makes"):
        check_encoder(base_h, 1664, 1280)
    with pytest.raises(PitError, match="another one"):
        check_encoder(base_h, 128, None)
    with pytest.raises(PitError, match="which an encoder of width 128 makes"):
        check_encoder(on_meta("plus", 128, 4, SDXL), 1280, 1024)


def test_families_are_compared_by_layer_count_and_width():
    check_family(on_meta("plus", 1280, 16, SDXL), SDXL)
    sd15 = layers_of_config({"cross_attention_dim": 768})
    with pytest.raises(PitError, match=r"'x.bin' is made for SD1\.5 \(16 .* model is SDXL \(70 "):
        check_family(on_meta("plus", 1280, 16, sd15), SDXL)
    with pytest.raises(PitError, match="text width 1280"):
        check_family(on_meta("plus", 1280, 16, sd15), SD15)


# files that are something else


def write(tmp_path, tensors, metadata=None):
    path = tmp_path / "file.safetensors"
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight"], "is a LoRA"),
        (["base_model.model.to_k.lora_A.weight"], "is a LoRA"),
        (["unet.down_blocks.1.attentions.0.processor.to_k_lora.down.weight"], "is a LoRA"),
        (
            ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", "conv_in.weight"],
            "is a UNet",
        ),
        (["model.diffusion_model.input_blocks.0.0.weight"], "is a full Stable Diffusion checkpoint"),
        (["vision_model.embeddings.class_embedding"], "is an image encoder"),
        (["text_model.embeddings.token_embedding.weight"], "is a text encoder"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is a VAE"),
        (["x_embedder.weight"], "is an IP-Prior"),
        (["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"], "such as Flux"),
        (["tensor"], "is a single tensor"),
        (["foo.bar"], r"something else \(its keys begin with foo\.bar\)"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path, keys, message):
    path = write(tmp_path, dict.fromkeys(keys, torch.zeros(2, 2)))
    with pytest.raises(PitError, match=rf"'file.safetensors' .*{message}"):
        load_ip_adapter(path)


def test_face_adapters_are_refused(tmp_path):
    tensors = plus().state_dict()
    lora = {**tensors, "ip_adapter.0.to_q_lora.down.weight": torch.zeros(2, 2)}
    instant = plus(embedding_dim=512).state_dict()
    layers = {k: v for k, v in tensors.items() if k.startswith("ip_adapter")}
    face_id = {**layers, "image_proj.proj.0.weight": torch.zeros(8, 512)}
    for state in (lora, instant, face_id):
        with pytest.raises(PitError, match="FaceID or InstantID"):
            load_ip_adapter(write(tmp_path, state))
    with pytest.raises(PitError, match="full-face"):
        load_ip_adapter(write(tmp_path, {**layers, "image_proj.proj.0.weight": torch.zeros(8, 1280)}))


def broken(change):
    tensors = dict(plus().state_dict())
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("ip_adapter.3.to_v_ip.weight"), "missing: ip_adapter.3.to_v_ip.weight"),
        (lambda t: t.pop("ip_adapter.1.to_k_ip.weight"), r"missing: ip_adapter\.1\.to_k_ip\.weight"),
        (
            lambda t: t.update({"ip_adapter.3.to_v_ip.weight": torch.zeros(8, 40)}),
            r"is \(8, 40\) instead of \(16, 40\)",
        ),
        (lambda t: t.update({"ip_adapter.1.to_k_ip.weight": torch.zeros(0, 40)}), r"shape \(0, 40\)"),
        (lambda t: t.update({"ip_adapter.1.to_k_ip.weight": torch.zeros(16, 30)}), r"instead of \(16, 40\)"),
        (lambda t: t.update({"image_proj.latents": torch.zeros(5, 128)}), "which no IP-Adapter has"),
        (lambda t: t.update({"image_proj.extra": torch.zeros(1)}), "unexpected: image_proj.extra"),
        (lambda t: t.pop("image_proj.proj_in.weight"), "lacks 'image_proj.proj_in.weight'"),
        (lambda t: t["image_proj.proj_in.bias"].fill_(float("nan")), "NaN or infinite.*proj_in.bias"),
        (lambda t: t.update({"image_proj.proj_in.bias": torch.zeros(128, dtype=torch.int32)}), "torch.int32"),
        (
            lambda t: t.update({"image_proj.layers.0.0.to_q.weight": torch.zeros(96, 128)}),
            "multiple of 64 per head",
        ),
        (lambda t: t.update({"image_proj.layers.7.0.to_q.weight": torch.zeros(1)}), "missing"),
    ],
)
def test_damaged_adapters_are_described(tmp_path, change, message):
    with pytest.raises(PitError, match=message):
        load_ip_adapter(write(tmp_path, broken(change)))


def test_half_an_adapter_is_named(tmp_path):
    state = plus().state_dict()
    with pytest.raises(PitError, match="no attention layers"):
        load_ip_adapter(write(tmp_path, {k: v for k, v in state.items() if k.startswith("image_proj")}))
    with pytest.raises(PitError, match="neither Plus nor base"):
        layers = {k: v for k, v in state.items() if k.startswith("ip_adapter")}
        load_ip_adapter(write(tmp_path, {**layers, "image_proj.other": torch.zeros(1)}))


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"dim_head": "x"}', '{"dim_head": 0}', '{"dim_head": true}', "[" * 9999]
)
def test_damaged_metadata_is_described(tmp_path, config):
    with pytest.raises(PitError, match="damaged metadata"):
        load_ip_adapter(write(tmp_path, plus().state_dict(), {"pit_config": config}))


def test_saving_refuses_other_suffixes_and_nan_and_leaves_nothing(tmp_path):
    with pytest.raises(PitError, match="name the file a.safetensors"):
        save_ip_adapter(tmp_path / "a.bin", plus())
    adapter = plus()
    with torch.no_grad():
        adapter.image_proj.proj_in.bias[0] = float("inf")
    with pytest.raises(PitError, match="NaN or infinite"):
        save_ip_adapter(tmp_path / "a.safetensors", adapter)
    assert list(tmp_path.iterdir()) == []
