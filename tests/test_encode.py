"""Pictures to tokens: preprocessing against transformers' own, encoder files of every layout, encoding."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from pit_core.errors import PitError
from pit_core.ip_adapter.adapter import IPAdapter, IPLayers
from pit_core.ip_adapter.encode import (
    CLIP_MEAN,
    CLIP_STD,
    encode_tokens,
    hash_pixels,
    load_image_encoder,
    null_pixels,
    null_tokens,
    preprocess,
    rgb_on_white,
    save_image_encoder,
    tokens_from_features,
)
from pit_core.ip_adapter.encoder import ImageEncoder
from pit_core.ip_adapter.resampler import ImageProjection, Resampler

log = logging.getLogger(__name__)
PROCESSOR = CLIPImageProcessor()
TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
    "hidden_act": "gelu",
}


def picture(width, height, seed=0, mode="RGB"):
    """Smooth colours with noise, so that every resampling difference shows."""
    rng = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    low = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(low, np.int16) + rng.integers(-40, 40, (height, width, 3))
    rgb = Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode.replace("A", "") or "L")
    if channels in (2, 4) and mode.endswith("A"):
        rgb.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return rgb


def reference(images, **kwargs):
    return PROCESSOR(images, return_tensors="pt", **kwargs)["pixel_values"]


def as_tensor(image):
    return torch.from_numpy(np.array(image)).float().div(255).reshape(1, image.height, image.width, -1)


def vision_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**TINY, **changes})).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.2
    return model


def plus(width=64, tokens=5):
    torch.manual_seed(1)
    return IPAdapter(Resampler(32, 1, 8, 4, tokens, width, 40, 2), IPLayers([8], 40)).requires_grad_(False)


def base(width=24):
    torch.manual_seed(1)
    return IPAdapter(ImageProjection(width, 40, 4), IPLayers([8], 40)).requires_grad_(False)


# preprocessing


@pytest.mark.parametrize("side", [1, 7, 100, 224, 225, 500, 1024])
def test_squares_equal_transformers(side):
    image = picture(side, side, seed=side)
    error = (preprocess(image) - reference(image)).abs().max().item()
    log.info("side %d: largest error %.2e", side, error)
    assert error < 1e-5
    assert torch.equal(preprocess(as_tensor(image)), preprocess(image))
    for fit in ("pad", "stretch"):
        assert torch.equal(preprocess(image, fit=fit), preprocess(image))


@pytest.mark.parametrize(
    "size", [(300, 200), (201, 333), (640, 479), (37, 1000), (225, 224), (1000, 999), (2, 60)]
)
def test_cropped_rectangles_equal_transformers_too(size):
    image = picture(*size)
    assert (preprocess(image, fit="crop") - reference(image)).abs().max() < 1e-5


def test_other_sizes_and_normalisations():
    image, mean, std = picture(100, 100), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = reference(
        image,
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=list(mean),
        image_std=list(std),
    )
    assert (preprocess(image, 32, mean=mean, std=std) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "CMYK", "P", "1", "YCbCr"])
def test_every_mode_becomes_rgb_with_transparency_on_white(mode):
    image = picture(60, 60, mode="RGBA" if mode == "LA" else mode if mode == "RGBA" else "RGB").convert(mode)
    assert (
        preprocess(image) - reference(image.convert("RGBA") if mode == "LA" else image)
    ).abs().max() < 0.02
    clear = Image.new("RGBA", (50, 50), (0, 0, 0, 0))
    assert torch.equal(preprocess(clear), null_pixels("white"))


def test_tensors_with_alpha_are_put_on_white_and_grey_ones_repeated():
    image = picture(64, 64, mode="RGBA")
    assert (preprocess(as_tensor(image)) - preprocess(image)).abs().max() < 2.5 / 255 / min(CLIP_STD)
    grey = picture(64, 64, mode="L")
    assert torch.equal(preprocess(as_tensor(grey)), preprocess(grey))


def test_uint8_missing_batch_and_values_out_of_range():
    image = picture(64, 48)
    array = torch.from_numpy(np.array(image))
    assert torch.equal(preprocess(array), preprocess(image))
    assert torch.equal(preprocess(array.float() / 255), preprocess(image))
    wild = torch.tensor([-3.0, 0.5, 7.0]).expand(1, 8, 8, 3)
    assert torch.equal(preprocess(wild), preprocess(wild.clamp(0, 1)))
    assert torch.equal(preprocess(array.half()[None] / 255), preprocess(array.half().float()[None] / 255))


def test_a_batch_of_mixed_pictures_keeps_its_order():
    images = [picture(30, 50), picture(200, 20, 1, "RGBA"), picture(9, 9, 2, "L")]
    batch = preprocess(images)
    assert batch.shape == (3, 3, 224, 224) and batch.dtype == torch.float32
    assert all(torch.equal(batch[i], preprocess(image)[0]) for i, image in enumerate(images))


def test_sixteen_bit_greys_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    eight = Image.fromarray((ramp // 257).astype(np.uint8))
    assert torch.equal(preprocess(Image.fromarray(ramp)), preprocess(eight))
    assert torch.equal(preprocess(Image.fromarray(ramp.astype(np.int32))), preprocess(eight))
    assert rgb_on_white(eight).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 4096), (4096, 1), (1, 20000), (20000, 3)])
def test_extreme_aspects_stay_small(size):
    for fit in ("crop", "stretch"):
        pixels = preprocess(Image.new("RGB", size, "red"), fit=fit)
        assert torch.allclose(pixels, preprocess(Image.new("RGB", (9, 9), "red")), atol=1e-6)


def test_padding_is_white_and_centred():
    pixels = preprocess(Image.new("RGB", (224, 112), "black"), fit="pad")
    white, black = null_pixels("white")[0], null_pixels("black")[0]
    assert torch.allclose(pixels[0, :, :50], white[:, :50]) and torch.allclose(
        pixels[0, :, -50:], white[:, -50:]
    )
    assert torch.allclose(pixels[0, :, 62:162], black[:, 62:162])


def test_broken_pictures_are_described():
    for bad, message in (
        (torch.zeros(0, 8, 8, 3), "batch is empty"),
        ([], "batch is empty"),
        (torch.zeros(8, 8), r"got \(8, 8\)"),
        (torch.zeros(1, 3, 8, 8), r"1, 3 or 4 channels"),
        (torch.zeros(1, 0, 8, 3), "channels"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.int64), "torch.int64"),
        (torch.full((1, 8, 8, 3), float("nan")), "NaN"),
    ):
        with pytest.raises(PitError, match=message):
            preprocess(bad)
    with pytest.raises(PitError, match="crop, pad, stretch, but got 'squash'"):
        preprocess(picture(8, 8), fit="squash")


def test_the_three_nulls():
    grey = preprocess(Image.new("RGB", (50, 50), (123, 117, 104)))
    assert null_pixels("grey").count_nonzero() == 0 and grey.abs().max() < 0.01
    assert torch.allclose(null_pixels("white", batch=2), preprocess(Image.new("RGB", (5, 5), "white")))
    assert torch.allclose(null_pixels("black", size=32), preprocess(Image.new("RGB", (5, 5), "black"), 32))
    with pytest.raises(PitError, match="grey, black, white, but got 'blue'"):
        null_pixels("blue")
    assert len(CLIP_MEAN) == 3


def test_hashes_follow_the_content():
    a = preprocess(picture(20, 20))
    assert hash_pixels(a) == hash_pixels(a.clone()) == hash_pixels(preprocess(picture(20, 20)))
    assert len({hash_pixels(a), hash_pixels(a + 1e-6), hash_pixels(a.half()), hash_pixels(a[:, :2])}) == 4


# encoder files


def outputs(model, pixels):
    with torch.no_grad():
        out = model(pixel_values=pixels, output_hidden_states=True)
    return out.hidden_states[-2], out.image_embeds


def same_outputs(encoder, model):
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    pairs = zip(encoder(pixels), outputs(model, pixels), strict=True)
    return all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def named_without_prefix(model):
    return {k.removeprefix("vision_model."): v for k, v in model.state_dict().items()}


def test_folder_and_single_file_give_the_same_encoder(tmp_path):
    model = vision_model()
    model.save_pretrained(tmp_path / "folder")
    save_image_encoder(tmp_path / "one.safetensors", model)
    folder, single = load_image_encoder(tmp_path / "folder"), load_image_encoder(tmp_path / "one.safetensors")
    assert same_outputs(folder, model) and same_outputs(single, model)
    assert folder.content_hash == single.content_hash
    assert (single.hidden_width, single.projection_dim, single.image_size) == (64, 24, 32)
    assert not any(p.requires_grad for p in single.model.parameters())
    assert not any(t.is_meta for t in (*single.model.parameters(), *single.model.buffers()))


def test_the_first_output_is_the_state_before_the_last_layer_without_the_final_norm(tmp_path):
    model = vision_model()
    hidden, _ = ImageEncoder(model)(torch.ones(1, 3, 32, 32))
    captured = []
    last = next(m for n, m in model.named_modules() if n.endswith("encoder.layers.2"))
    last.register_forward_pre_hook(
        lambda m, args, kwargs: captured.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    outputs(model, torch.ones(1, 3, 32, 32))
    assert torch.equal(hidden, captured[0])


@pytest.mark.parametrize("layout", ["old", "no prefix", "respelled", "whole clip", "wrapped"])
def test_files_of_old_and_new_transformers_versions_load(tmp_path, layout):
    model = vision_model()
    tensors = dict(model.state_dict())
    if layout == "old":
        tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    elif layout == "no prefix":
        tensors = named_without_prefix(model)
    elif layout == "respelled":
        tensors = {k.replace("pre_layrnorm", "pre_layernorm"): v for k, v in tensors.items()}
    elif layout == "whole clip":
        tensors |= {"text_model.embeddings.position_ids": torch.arange(9), "logit_scale": torch.tensor(1.0)}
        tensors |= {"text_projection.weight": torch.zeros(2, 2), "text_model.encoder.x": torch.zeros(2)}
    else:
        tensors = {f"image_encoder.{k}": v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors", {"pit_config": '{"num_attention_heads": 4}'})
    assert same_outputs(load_image_encoder(tmp_path / "x.safetensors"), model)
    (tmp_path / "folder").mkdir()
    config = (
        {"vision_config": TINY, "projection_dim": 24, "model_type": "clip"}
        if layout == "whole clip"
        else TINY
    )
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "folder" / "pytorch_model.bin")
    assert same_outputs(load_image_encoder(tmp_path / "folder"), model)


def test_sharded_folders_load(tmp_path):
    model = vision_model()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert same_outputs(load_image_encoder(tmp_path), model)


@pytest.mark.parametrize(
    ("width", "heads", "act"), [(128, 2, "gelu"), (1280, 16, "gelu"), (1024, 16, "quick_gelu")]
)
def test_heads_and_activation_of_single_files_follow_the_width(tmp_path, width, heads, act):
    config = {
        **TINY,
        "hidden_size": width,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    save_file(
        CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).state_dict(), tmp_path / "x.safetensors"
    )
    found = load_image_encoder(tmp_path / "x.safetensors").config
    assert (found.num_attention_heads, found.hidden_act) == (heads, act)
    assert (found.num_hidden_layers, found.patch_size, found.image_size) == (1, 8, 32)


def test_normalisation_travels_with_the_file(tmp_path):
    encoder = ImageEncoder(vision_model(), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    save_image_encoder(tmp_path / "x.safetensors", encoder, {"step": 1})
    again = load_image_encoder(tmp_path / "x.safetensors")
    assert (again.mean, again.std) == (encoder.mean, encoder.std)
    assert again.preprocess(picture(40, 40)).shape == (1, 3, 32, 32)
    vision_model().save_pretrained(tmp_path / "folder")
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "folder")
    assert load_image_encoder(tmp_path / "folder").mean == (0.1, 0.2, 0.3)


def test_dtype_is_kept_or_converted(tmp_path):
    save_image_encoder(tmp_path / "x.safetensors", vision_model(), dtype=torch.float16)
    kept = load_image_encoder(tmp_path / "x.safetensors")
    assert {p.dtype for p in kept.model.parameters()} == {torch.float16}
    hidden, _ = kept(torch.randn(1, 3, 32, 32))
    assert hidden.dtype == torch.float16
    wide = load_image_encoder(tmp_path / "x.safetensors", dtype=torch.float32)
    assert {p.dtype for p in wide.model.parameters()} == {torch.float32}


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("visual_projection.weight"), "'visual_projection.weight' is missing"),
        (lambda t: t.pop("vision_model.post_layernorm.bias"), "missing: vision_model.post_layernorm.bias"),
        (
            lambda t: t.update({"vision_model.post_layernorm.bias": torch.zeros(3)}),
            r"is \(3,\) instead of \(64,\)",
        ),
        (lambda t: t["visual_projection.weight"].fill_(float("inf")), "NaN or infinite"),
        (lambda t: t.pop("vision_model.embeddings.class_embedding"), "is not a CLIP image encoder"),
        (
            lambda t: t.update({"vision_model.embeddings.position_embedding.weight": torch.zeros(0, 64)}),
            "shape",
        ),
    ],
)
def test_damaged_encoders_are_described(tmp_path, edit, message):
    save_image_encoder(tmp_path / "x.safetensors", vision_model())
    change(tmp_path / "x.safetensors", edit)
    with pytest.raises(PitError, match=message):
        load_image_encoder(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"\xff\xfe{}"),
        ("config.json", b'{"vision_config": 5}'),
        ("preprocessor_config.json", b"\xff"),
        ("preprocessor_config.json", b'{"image_mean": 5}'),
        ("preprocessor_config.json", b'{"image_std": [1, 0, 1]}'),
        ("preprocessor_config.json", b'{"image_mean": ["a", "b", "c"]}'),
        ("model.safetensors.index.json", b'{"weight_map": ["a"]}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}'),
    ],
)
def test_damaged_settings_beside_an_encoder_are_one_sentence(tmp_path, name, content):
    vision_model().save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PitError, match="has damaged settings"):
        load_image_encoder(tmp_path)


def test_other_files_and_folders_are_named(tmp_path):
    for keys, message in (
        (["visual.class_embedding"], "OpenCLIP"),
        (["image_proj.latents"], "but an IP-Adapter"),
        (["text_model.final_layer_norm.bias"], "but a text encoder"),
    ):
        save_file(dict.fromkeys(keys, torch.zeros(2)), tmp_path / "x.safetensors")
        with pytest.raises(PitError, match=message):
            load_image_encoder(tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PitError, match="holds no image encoder"):
        load_image_encoder(tmp_path / "empty")
    with pytest.raises(PitError, match="no file"):
        load_image_encoder(tmp_path / "absent")
    vision_model().save_pretrained(tmp_path / "folder")
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"model_type": "siglip"}', "siglip"),
    ):
        (tmp_path / "folder" / "config.json").write_text(text)
        with pytest.raises(PitError, match=message):
            load_image_encoder(tmp_path / "folder")


# tokens


def test_plus_reads_hidden_states_and_base_the_embedding():
    encoder, pixels = ImageEncoder(vision_model()), torch.randn(3, 3, 32, 32)
    hidden, embeds = encoder(pixels)
    assert torch.allclose(encode_tokens(encoder, plus(), pixels), plus()(hidden), atol=1e-5)
    assert torch.allclose(encode_tokens(encoder, base(), pixels), base()(embeds), atol=1e-5)
    assert encode_tokens(encoder, plus(), pixels).shape == (3, 5, 40)


def test_long_batches_are_encoded_in_chunks():
    encoder, pixels, sizes = ImageEncoder(vision_model()), torch.randn(7, 3, 32, 32), []
    encoder.model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    tokens = encode_tokens(encoder, plus(), pixels, chunk=3)
    assert sizes == [3, 3, 1]
    assert torch.allclose(tokens, encode_tokens(encoder, plus(), pixels, chunk=100), atol=1e-5)


def test_pictures_may_be_given_as_they_are():
    encoder, images = ImageEncoder(vision_model()), [picture(40, 40), picture(30, 50)]
    expected = encode_tokens(encoder, plus(), encoder.preprocess(images, "pad"))
    assert torch.equal(encode_tokens(encoder, plus(), images, fit="pad"), expected)
    assert encode_tokens(encoder, plus(), images[0]).shape == (1, 5, 40)


def test_the_wrong_encoder_is_refused_before_it_runs():
    encoder = ImageEncoder(vision_model())
    with pytest.raises(PitError, match="hidden states of width 24"):
        encode_tokens(encoder, plus(width=24), torch.zeros(1, 3, 32, 32))
    with pytest.raises(PitError, match="image embeddings of width 64"):
        encode_tokens(encoder, base(width=64), torch.zeros(1, 3, 32, 32))
    with pytest.raises(PitError, match=r"pixels \(batch, 3, 32, 32\), but got \(1, 3, 16, 16\)"):
        encode_tokens(encoder, plus(), torch.zeros(1, 3, 16, 16))
    with pytest.raises(PitError, match="batch is empty"):
        encode_tokens(encoder, plus(), torch.zeros(0, 3, 32, 32))


def test_null_tokens_default_to_what_the_adapter_was_trained_with():
    encoder = ImageEncoder(vision_model())
    assert torch.equal(
        null_tokens(encoder, plus()), encode_tokens(encoder, plus(), torch.zeros(1, 3, 32, 32))
    )
    assert torch.equal(null_tokens(encoder, base()), base()(torch.zeros(1, 24)))
    white = encoder.preprocess(Image.new("RGB", (9, 9), "white"))
    assert torch.allclose(
        null_tokens(encoder, plus(), "white"), encode_tokens(encoder, plus(), white), atol=1e-5
    )
    assert not torch.equal(null_tokens(encoder, base(), "grey"), null_tokens(encoder, base()))
    with pytest.raises(PitError, match="belongs to base adapters"):
        null_tokens(encoder, plus(), "zeros")


def test_half_precision_features_give_finite_fp32_tokens_and_nan_is_refused():
    tokens = tokens_from_features(plus().half(), torch.full((1, 4, 64), 6e4, dtype=torch.float16))
    assert tokens.dtype == torch.float32 and torch.isfinite(tokens).all()
    with pytest.raises(PitError, match="image features are not finite"):
        tokens_from_features(base(), torch.full((1, 24), float("nan")))
    with pytest.raises(PitError, match=r"3 dimensions and width 64, but got the shape \(1, 24\)"):
        tokens_from_features(plus(), torch.zeros(1, 24))
