"""Tokens to pictures through a real SDXL pipeline at toy size."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_stack
import torch
from lora_files import lora_file, lora_key, unet_shapes
from original_layout import original_layout
from PIL import Image
from safetensors.torch import load_file, save_file

from pit_core.download import RELEASES
from pit_core.errors import PitError
from pit_core.ip_adapter.processor import install_ip_adapter, installed_context, uninstall_ip_adapter
from pit_core.lora.formats import lora_from_tensors
from pit_core.lora.placing import Strengths
from pit_core.render import (
    NEGATIVE,
    PROMPT,
    TEXT_ENCODER_KEYS,
    Renderer,
    RenderSettings,
    check_single_file,
    for_ip_lora,
    layers_on_disk,
    load_renderer,
    load_single_file,
)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    unet = tiny_stack.unet()
    adapter = tiny_stack.adapter(unet)
    # Random layers, or the image tokens would do what the text does.
    torch.manual_seed(9)
    for parameter in adapter.layers.parameters():
        parameter.data = torch.randn_like(parameter)
    return Renderer(tiny_stack.pipe(unet), adapter, encode_prompt=tiny_stack.encode_prompt)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randn(5, tiny_stack.TOKENS, tiny_stack.CONTEXT, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def null() -> torch.Tensor:
    return torch.zeros(1, tiny_stack.TOKENS, tiny_stack.CONTEXT)


QUICK = RenderSettings(steps=3)


def _difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def _probe(unet: torch.nn.Module) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    added = {"text_embeds": torch.randn(1, tiny_stack.TEXT, generator=g), "time_ids": torch.ones(1, 6)}
    text = torch.randn(1, 5, tiny_stack.CONTEXT, generator=g)
    with torch.no_grad():
        return unet(
            torch.randn(1, 4, 8, 8, generator=g), 10, encoder_hidden_states=text, added_cond_kwargs=added
        ).sample


def test_the_defaults_are_the_papers() -> None:
    settings = RenderSettings()
    assert (settings.prompt, settings.negative) == (PROMPT, NEGATIVE)
    assert (settings.steps, settings.guidance, settings.weight) == (50, 5.0, 1.0)


def test_pictures_have_the_unets_own_size(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    images = renderer.render(tokens[:1], null, QUICK, seeds=[1])
    assert (images[0].size, images[0].mode) == ((32, 32), "RGB")
    assert renderer.render(tokens[:1], null, QUICK, seeds=[1], size=(48, 24))[0].size == (48, 24)


def test_a_row_does_not_depend_on_its_batch(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    seeds = [7, 2**64 - 1, 0, 7, 9]
    together = renderer.render(tokens, null, QUICK, seeds=seeds, batch=5)
    in_pairs = renderer.render(tokens, null, QUICK, seeds=seeds, batch=2)
    for i, seed in enumerate(seeds):
        alone = renderer.render(tokens[i : i + 1], null, QUICK, seeds=[seed])[0]
        assert _difference(alone, together[i]) <= 1
        assert _difference(alone, in_pairs[i]) <= 1


def test_a_rows_noise_is_the_same_bits_in_any_batch(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    seen: list[torch.Tensor] = []
    hook = renderer.unet.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(args[0].clone()), with_kwargs=True
    )
    try:
        renderer.render(tokens[:3], null, seeds=[5, 6, 7], steps=1)
        renderer.render(tokens[1:2], null, seeds=[6], steps=1)
    finally:
        hook.remove()
    assert torch.equal(seen[0][1], seen[1][0])


def test_seed_tokens_prompt_and_weight_all_matter(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    base = renderer.render(tokens[:1], null, QUICK, seeds=[1])[0]
    others = [
        renderer.render(tokens[:1], null, QUICK, seeds=[2])[0],
        renderer.render(tokens[1:2], null, QUICK, seeds=[1])[0],
        renderer.render(tokens[:1], null, QUICK, seeds=[1], prompt="a red horn")[0],
        renderer.render(tokens[:1], null, QUICK, seeds=[1], negative="a red horn")[0],
        renderer.render(tokens[:1], null, QUICK, seeds=[1], weight=0.3)[0],
        renderer.render(tokens[:1], null, QUICK, seeds=[1], weight={0: 1.0})[0],
    ]
    assert all(_difference(base, other) > 0 for other in others)
    assert _difference(base, renderer.render(tokens[:1], null, QUICK, seeds=[1])[0]) == 0


def test_weight_zero_is_the_plain_model(renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor) -> None:
    a = renderer.render(tokens[:1], null, QUICK, seeds=[1], weight=0.0)[0]
    b = renderer.render(tokens[1:2], null, QUICK, seeds=[1], weight=0.0)[0]
    assert _difference(a, b) == 0


def test_a_prompt_is_drawn_without_an_adapter(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    alone = Renderer(renderer.pipe, None, encode_prompt=tiny_stack.encode_prompt)
    drawn = alone.draw(QUICK, seeds=[4, 5])
    beside = renderer.render(tokens[:2], null, replace(QUICK, weight=0.0), seeds=[4, 5])
    assert all(_difference(a, b) <= 1 for a, b in zip(drawn, beside, strict=True))
    assert _difference(*drawn) > 2
    with pytest.raises(PitError, match="has no IP-Adapter"):
        alone.render(tokens[:1], null, QUICK, seeds=[4])
    with pytest.raises(PitError, match="Expected seeds"):
        alone.draw(QUICK, seeds=[-1])


def test_without_null_tokens_both_halves_get_the_same(renderer: Renderer, tokens: torch.Tensor) -> None:
    same = renderer.render(tokens[:2], None, QUICK, seeds=[1, 2])
    explicit = renderer.render(tokens[:2], tokens[:2], QUICK, seeds=[1, 2])
    assert max(_difference(a, b) for a, b in zip(same, explicit, strict=True)) <= 1


@pytest.mark.parametrize("guidance", [1.0, 0.0])
def test_without_guidance_only_one_half_runs(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor, guidance: float
) -> None:
    rows: list[int] = []
    hook = renderer.unet.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    try:
        renderer.render(tokens[:2], null, QUICK, seeds=[1, 2], guidance=guidance)
    finally:
        hook.remove()
    assert rows == [2, 2, 2]


def test_keys_and_values_are_computed_once_a_batch_not_once_a_step(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    calls: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_: calls.append(1)) for layer in renderer.adapter.layers.values()
    ]
    try:
        renderer.render(tokens[:2], null, seeds=[1, 2], steps=7)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == 2 * len(hooks)  # cond and uncond


def test_the_unet_is_given_back_as_it_was(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    before, processors = _probe(renderer.unet), dict(renderer.unet.attn_processors)
    renderer.render(tokens[:1], null, QUICK, seeds=[1])
    assert torch.equal(_probe(renderer.unet), before)
    assert renderer.unet.attn_processors == processors


def test_an_interrupted_run_gives_the_unet_back_too(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    before = _probe(renderer.unet)

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        renderer.render(tokens[:1], null, QUICK, seeds=[1], progress=stop)
    assert installed_context(renderer.unet) is None
    assert torch.equal(_probe(renderer.unet), before)


def test_a_context_that_was_there_before_stays(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    context = install_ip_adapter(renderer.unet)
    try:
        source = context.add(tokens[:1], adapter=renderer.adapter)
        renderer.render(tokens[1:2], null, QUICK, seeds=[1])
        assert installed_context(renderer.unet) is context
        assert context.sources == [source]
        assert context.order is None
    finally:
        uninstall_ip_adapter(renderer.unet)


def test_progress_counts_all_batches(renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor) -> None:
    seen: list[tuple[int, int]] = []
    renderer.render(tokens[:3], null, QUICK, seeds=[1, 2, 3], batch=2, progress=lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_a_run_can_start_from_a_picture(renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor) -> None:
    start = Image.linear_gradient("L").convert("RGB")
    seen: list[tuple[int, int]] = []
    settings = RenderSettings(steps=10)
    images = renderer.render(
        tokens[:2],
        null,
        settings,
        seeds=[1, 2],
        init_image=start,
        strength=0.3,
        progress=lambda *at: seen.append(at),
    )
    assert [image.size for image in images] == [(32, 32)] * 2
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert _difference(images[0], images[1]) > 0


def test_numbers_that_overflow_are_reported(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    with pytest.raises(PitError, match="NaN at step 1"):
        renderer.render(1e30 * tokens[:1], null, QUICK, seeds=[1], weight=1e30)


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"steps": 10**6},
        {"batch": 0},
        {"guidance": float("nan")},
        {"weight": float("inf")},
        {"weight": {0: float("nan")}},
        {"strength": 0.0},
        {"strength": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(values: dict) -> None:
    with pytest.raises(PitError, match="Expected"):
        RenderSettings(**values)


def test_tokens_seeds_and_sizes_that_do_not_fit_are_refused(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    with pytest.raises(PitError, match="one seed per picture, got 1 for 2"):
        renderer.render(tokens[:2], null, QUICK, seeds=[1])
    for seed in (-1, 2**64, 1.5, True):
        with pytest.raises(PitError, match="whole numbers from 0"):
            renderer.render(tokens[:1], null, QUICK, seeds=[seed])
    with pytest.raises(PitError, match="shape"):
        renderer.render(tokens[0], null, QUICK, seeds=[1])
    with pytest.raises(PitError, match="null tokens"):
        renderer.render(tokens[:3], tokens[:2], QUICK, seeds=[1, 2, 3])
    with pytest.raises(PitError, match="NaN or infinite"):
        renderer.render(tokens[:1] * float("nan"), null, QUICK, seeds=[1])
    with pytest.raises(PitError, match="multiples of 4 px, got 33 x 32"):
        renderer.render(tokens[:1], null, QUICK, seeds=[1], size=(33, 32))
    with pytest.raises(PitError, match=r"\(batch, tokens, 32\)"):
        renderer.render(tokens[:1, :, :8], null, QUICK, seeds=[1])


def test_an_adapter_of_another_family_is_refused_at_once(renderer: Renderer) -> None:
    from diffusers import UNet2DConditionModel

    other = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    with pytest.raises(PitError, match="its own family"):
        Renderer(tiny_stack.pipe(other), renderer.adapter, encode_prompt=tiny_stack.encode_prompt)


# LoRAs


def _weights(renderer: Renderer) -> dict[str, torch.Tensor]:
    both = {**renderer.unet.state_dict(), **renderer.adapter.state_dict()}
    return {name: tensor.clone() for name, tensor in both.items()}


def test_a_lora_changes_unet_and_adapter_and_is_gone_afterwards(
    renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor
) -> None:
    shapes = unet_shapes(renderer.unet, ip=True)
    file = lora_file(shapes)
    lora, before, adapter = lora_from_tensors(file, name="x"), _weights(renderer), renderer.adapter
    (plain,) = renderer.render(tokens[:1], null, QUICK, seeds=[1])
    with renderer.under_loras([(lora, Strengths(4.0, middle=0.0)), (lora, Strengths(4.0, middle=0.0))]):
        inside = _weights(renderer)
        (under,) = renderer.render(tokens[:1], null, QUICK, seeds=[1])
    for name in (each for each in shapes if not each.endswith("_ip")):
        down, up = (file[lora_key(name, part, "released")].double() for part in ("down", "up"))
        strength = 0.0 if name.startswith("mid") else 8.0
        expected = before[f"{name}.weight"].double() + strength * up @ down
        assert (inside[f"{name}.weight"] - expected).abs().max() < 1e-5
    changed = {name for name in before if not torch.equal(before[name], inside[name])}
    assert len(changed) == len(shapes) - sum("mid_block" in each and "_ip" not in each for each in shapes)
    assert _difference(under, plain) > 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in _weights(renderer).items())
    assert renderer.adapter is adapter
    assert _difference(renderer.render(tokens[:1], null, QUICK, seeds=[1])[0], plain) == 0


def test_a_run_that_fails_under_a_lora_gives_everything_back(renderer: Renderer) -> None:
    lora = lora_from_tensors(lora_file(unet_shapes(renderer.unet, ip=True)))
    before, adapter = _weights(renderer), renderer.adapter
    with pytest.raises(KeyboardInterrupt), renderer.under_loras([(lora, Strengths())]):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in _weights(renderer).items())
    assert renderer.adapter is adapter


def test_a_lora_of_another_model_changes_nothing(renderer: Renderer) -> None:
    before = _weights(renderer)
    fits = lora_from_tensors(lora_file(unet_shapes(renderer.unet)))
    strange = lora_from_tensors(lora_file({"mid_block.attentions.7.to_q": (4, 4)}), name="x")
    with (
        pytest.raises(PitError, match=r"'x' changes 1 layers, but 1 of them .*mid_block.attentions.7"),
        renderer.under_loras([(fits, Strengths()), (strange, Strengths())]),
    ):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in _weights(renderer).items())


def test_settings_for_an_ip_lora(renderer: Renderer, tokens: torch.Tensor, null: torch.Tensor) -> None:
    """No text in the unconditional half, not even an empty one, and the image tokens in both."""
    settings = for_ip_lora(QUICK)
    text = renderer._text(settings)
    assert not text["negative_prompt_embeds"].any() and not text["negative_pooled_prompt_embeds"].any()
    assert text["prompt_embeds"].any()
    (one,) = renderer.render(tokens[:1], null, settings, seeds=[1])
    (same,) = renderer.render(tokens[:1], None, QUICK, negative=None, seeds=[1])
    (other,) = renderer.render(tokens[:1], null, QUICK, negative=None, seeds=[1])
    assert _difference(one, same) == 0 and _difference(one, other) > 0


# folders and single files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stack.save(tmp_path_factory.mktemp("models")).sdxl


def test_a_diffusers_folder_is_loaded(saved: Path, tokens: torch.Tensor, null: torch.Tensor) -> None:
    adapter = tiny_stack.adapter(tiny_stack.unet())
    loaded = load_renderer(saved, adapter)
    assert loaded.pipe.watermark is None
    for key, value in tiny_stack.unet().state_dict().items():
        assert torch.equal(loaded.unet.state_dict()[key], value)
    assert loaded.render(tokens[:1], null, QUICK, seeds=[1])[0].size == (32, 32)


def test_a_folder_that_is_no_sdxl_is_refused(saved: Path, tmp_path: Path) -> None:
    adapter = tiny_stack.adapter(tiny_stack.unet())

    def refused(words: str) -> None:
        with pytest.raises(PitError, match=words):
            load_renderer(tmp_path, adapter)

    refused("no diffusers folder")
    (tmp_path / "model_index.json").write_text("{")
    refused("damaged")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    refused("holds a StableDiffusionPipeline, but an SDXL")
    (tmp_path / "model_index.json").write_text((saved / "model_index.json").read_text())
    refused("incomplete: its folder")
    for part in saved.iterdir():
        if part.is_dir():
            (tmp_path / part.name).mkdir()
    refused("config.json' is missing")
    (tmp_path / "unet" / "config.json").write_text((saved / "unet" / "config.json").read_text())
    refused("cannot be loaded as UNet2DConditionModel")


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("text_encoder_2", "model"),
    ],
)
def test_a_folder_that_lacks_weights_is_refused(saved: Path, tmp_path: Path, part: str, file: str) -> None:
    """The libraries would fill in random numbers, or nothing at all."""
    shutil.copytree(saved, tmp_path / "sdxl")
    path = tmp_path / "sdxl" / part / f"{file}.safetensors"
    tensors = load_file(path)
    del tensors[next(key for key in sorted(tensors) if key.endswith("weight"))]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(PitError, match="lacks 1 weights of its"):
        load_renderer(tmp_path / "sdxl", tiny_stack.adapter(tiny_stack.unet()))


@pytest.mark.parametrize("content", [b"[1]", b'{"block_out_channels": [null, 1]}', b"\xff"])
def test_a_damaged_unet_config_is_one_sentence(saved: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copytree(saved, tmp_path / "sdxl")
    (tmp_path / "sdxl" / "unet" / "config.json").write_bytes(content)
    with pytest.raises(PitError, match=r"config.json' is missing or damaged"):
        layers_on_disk(tmp_path / "sdxl")


def test_an_inpainting_unet_is_refused() -> None:
    unet = tiny_stack.unet()
    unet.register_to_config(in_channels=9)
    with pytest.raises(PitError, match="takes 9 channels"):
        Renderer(tiny_stack.pipe(unet), tiny_stack.adapter(unet), encode_prompt=tiny_stack.encode_prompt)


def test_pickled_weights_in_a_folder_are_not_opened(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sdxl"
    shutil.copytree(saved, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tiny_stack.unet().state_dict(), copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(PitError, match="cannot be loaded as UNet2DConditionModel"):
        load_renderer(copy, tiny_stack.adapter(tiny_stack.unet()))


def _single(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


UNET_KEY = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
TEXT_KEY = TEXT_ENCODER_KEYS["text_encoder_2"]
FIRST_KEY = TEXT_ENCODER_KEYS["text_encoder"]
VAE_KEY = "first_stage_model.decoder.conv_in.weight"


def test_a_single_file_is_checked_by_its_header(tmp_path: Path) -> None:
    def refused(content: bytes | dict, words: str) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(content) if isinstance(content, bytes) else _single(path, content)
        with pytest.raises(PitError, match=words):
            check_single_file(path)

    refused(b"", "is empty")
    refused(b"\x80\x02}q\x00.", "no safetensors file")
    refused({"a": (1,)}, "no Stable Diffusion checkpoint")
    refused({UNET_KEY: (64, 768)}, "not of the SDXL family")
    refused({UNET_KEY: (64, 2048), TEXT_KEY: (1,)}, "holds no VAE")
    refused(
        {UNET_KEY: (64, 2048), TEXT_KEY: (1,), VAE_KEY: (1,)}, "position_embedding.weight of its text_enc"
    )
    key = "conditioner.embedders.1.model.ln_final.weight"
    refused({UNET_KEY: (64, 2048), key: (1,), VAE_KEY: (1,), FIRST_KEY: (1,)}, "of its text_encoder_2")
    whole = _single(tmp_path / "a.safetensors", {UNET_KEY: (64, 32), TEXT_KEY: (1,)}).read_bytes()
    refused(whole[:-5], "damaged or cut short")


def test_a_single_file_needs_a_folder_with_tokenizers(tmp_path: Path) -> None:
    layers = tiny_stack.adapter(tiny_stack.unet()).layers
    assert len(layers.widths) == 11
    path = _single(
        tmp_path / "m.safetensors",
        {UNET_KEY: (64, 32), TEXT_KEY: (1,), FIRST_KEY: (1,), VAE_KEY: (1,)},
    )
    with pytest.raises(PitError, match="'pit download sdxl-config' .* --sdxl-config models/sdxl-config"):
        load_single_file(path, None)
    with pytest.raises(PitError, match="There is no folder"):
        load_single_file(path, tmp_path / "nowhere")


@pytest.fixture(scope="module")
def original(saved: Path) -> dict[str, torch.Tensor]:
    """The weights of the saved folder as a single file has them."""
    return original_layout(load_renderer(saved, tiny_stack.adapter(tiny_stack.unet())).pipe)


@pytest.fixture(scope="module")
def config(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings and tokenizers without weights: just the files that `pit download sdxl-config` brings."""
    folder = tmp_path_factory.mktemp("config") / "sdxl-config"
    for name in RELEASES["sdxl-config"].files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "special_tokens_map.json":
            path.write_text("{}", "utf-8")
        else:  # the released tokenizers are in the older form of two files
            words = path.name in ("vocab.json", "merges.txt")
            shutil.copy(saved.parent / "words" / path.name if words else saved / name, path)
    return folder


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (
            "conditioner.embedders.0.transformer.text_model.embeddings.token",
            "its text_encoder, such as .*token",
        ),
        (
            "conditioner.embedders.0.transformer.text_model.encoder.layers.2",
            "16 weights of its text_encoder,",
        ),
        ("conditioner.embedders.0.", "lacks conditioner.embedders.0.* of its text_encoder;"),
        ("conditioner.embedders.1.model.positional", "model.positional_embedding of its text_encoder_2;"),
        ("conditioner.embedders.1.model.text_proj", "its text_encoder_2, such as text_projection.weight"),
        ("model.diffusion_model.time_embed.0.weight", "lacks weights of its unet;"),
        (
            "model.diffusion_model.output_blocks.1.2.conv.bias",
            "its unet, such as output_blocks.1.2.conv.bias",
        ),
        ("first_stage_model.encoder.", "lacks weights of its vae"),
    ],
)
def test_a_single_file_that_lacks_weights_is_refused(
    original: dict[str, torch.Tensor], config: Path, tmp_path: Path, prefix: str, words: str
) -> None:
    path = tmp_path / "sdxl.safetensors"
    save_file({key: tensor for key, tensor in original.items() if not key.startswith(prefix)}, path)
    with pytest.raises(PitError, match=words) as raised:
        load_renderer(path, tiny_stack.adapter(tiny_stack.unet()), config=config)
    assert "give a complete" in str(raised.value)


def test_a_single_file_is_not_loaded_where_gaps_would_go_unseen(
    original: dict[str, torch.Tensor], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without accelerate diffusers would leave random numbers in them."""
    save_file(original, tmp_path / "sdxl.safetensors")
    monkeypatch.setattr("diffusers.utils.is_accelerate_available", lambda: False)
    with pytest.raises(PitError, match="needs the package accelerate"):
        load_single_file(tmp_path / "sdxl.safetensors", config)


def test_a_single_file_gives_the_pictures_of_its_folder(
    original: dict[str, torch.Tensor],
    saved: Path,
    config: Path,
    tmp_path: Path,
    tokens: torch.Tensor,
    null: torch.Tensor,
) -> None:
    adapter = tiny_stack.adapter(tiny_stack.unet())
    folder = load_renderer(saved, adapter)
    path = tmp_path / "sdxl.safetensors"
    save_file(original, path)
    single = load_renderer(path, adapter, config=config)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(each.pipe, name).state_dict() for each in (single, folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    pictures = [each.render(tokens[:1], null, QUICK, seeds=[1])[0] for each in (single, folder)]
    assert _difference(*pictures) == 0


def test_half_precision_variants_are_found(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sdxl"
    shutil.copytree(saved, copy)
    for path in copy.rglob("*.safetensors"):
        path.rename(path.with_name(path.stem + ".fp16.safetensors"))
    loaded = load_renderer(copy, tiny_stack.adapter(tiny_stack.unet()), dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.bfloat16
    assert json.loads((copy / "model_index.json").read_text())["_class_name"] == "StableDiffusionXLPipeline"
