"""SDXL through diffusers with image tokens: the headless decoder from IP+ space to pictures.

"Piece it Together" (arXiv 2503.10365): decoupled attention at weight 1.0, 50 steps, guidance 5.0, the
grey null for the unconditional half.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .errors import PitError
from .files import existing_file
from .ip_adapter.adapter import IPAdapter
from .ip_adapter.attention import Weight
from .ip_adapter.layers import AttentionLayer, layers_of_config, layers_of_ldm_shapes, layers_of_unet
from .ip_adapter.processor import install_ip_adapter, installed_context, uninstall_ip_adapter
from .lora.ip_deltas import apply_ip_deltas
from .lora.model import Lora, patched_weight
from .lora.placing import Placed, Strengths, place_lora

PROMPT = "best quality, high quality"
NEGATIVE = "monochrome, lowres, bad anatomy, worst quality, low quality"
MAX_SEED = 2**64 - 1
TEXT_ENCODER_KEYS = {
    "text_encoder": "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "text_encoder_2": "conditioner.embedders.1.model.positional_embedding",
}
"""What a single file's text encoders are recognised by."""

EncodePrompt = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts -> (embeddings (B, T, C), pooled (B, P)), both on the UNet's device or any other."""

Progress = Callable[[int, int], None]
"""Called after each denoising step with (steps done, steps in all), over all batches; raise to interrupt."""


@dataclass(frozen=True)
class RenderSettings:
    """How tokens become pictures; the defaults are the paper's.

    negative: None stands for embeddings of zeros, no text at all. weight: of the image tokens, one number or
    layer index -> number. size: (width, height) in pixels, None for the UNet's own. batch: pictures at a
    time. strength: how much of `init_image` is drawn anew. same_tokens: the unconditional half sees the image
    tokens, too, instead of null tokens.
    """

    prompt: str = PROMPT
    negative: str | None = NEGATIVE
    steps: int = 50
    guidance: float = 5.0
    weight: Weight = 1.0
    size: tuple[int, int] | None = None
    batch: int = 4
    strength: float = 1.0
    same_tokens: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
                raise PitError(f"Expected {name} to be a whole number from 1 to 1000, got {value!r}.")
        if not math.isfinite(self.guidance):
            raise PitError(f"Expected a finite guidance (5 is usual, 1 is none), got {self.guidance!r}.")
        weights = self.weight.values() if isinstance(self.weight, Mapping) else [self.weight]
        if not all(math.isfinite(weight) for weight in weights):
            raise PitError(f"Expected a finite weight (1 is usual), got {self.weight!r}.")
        if not 0 < self.strength <= 1:
            raise PitError(f"Expected a strength above 0 and up to 1, got {self.strength!r}.")


def for_ip_lora(settings: RenderSettings) -> RenderSettings:
    """The settings as IP-LoRAs are published to be sampled with: no negative prompt, and both halves see the
    image tokens."""
    return replace(settings, negative=None, same_tokens=True)


class Renderer:
    """An SDXL-family pipeline and the adapter whose tokens it draws; None for one that draws prompts alone.

    pipe: diffusers' StableDiffusionXLPipeline. encode_prompt: takes the place of the pipeline's own, which
    then needs neither tokenizers nor text encoders. Between calls the UNet is as it was given, bit for bit.
    Raises PitError when the adapter does not fit the UNet.
    """

    def __init__(
        self, pipe: Any, adapter: IPAdapter | None, *, encode_prompt: EncodePrompt | None = None
    ) -> None:
        self.pipe = pipe
        self.adapter = adapter
        self._encode_prompt = encode_prompt
        pipe.set_progress_bar_config(disable=True)
        if adapter is not None:
            check_adapter_fits(pipe.unet, adapter)
        takes, made = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if takes != made:
            raise PitError(
                f"This UNet takes {takes} channels, but its VAE makes {made}: it is made for inpainting or "
                "another special task; give a plain SDXL model."
            )
        if encode_prompt is None and pipe.tokenizer_2 is None:
            raise PitError("This SDXL has no text encoder; give the complete model.")
        if max(self.default_size) >= 512:  # one picture at a time: decoding is where memory runs out
            pipe.vae.enable_slicing()

    @property
    def unet(self) -> Any:
        return self.pipe.unet

    @property
    def default_size(self) -> tuple[int, int]:
        """(width, height) in pixels that the UNet was trained at."""
        sample = self.unet.config.sample_size
        height, width = sample if isinstance(sample, list | tuple) else (sample, sample)
        return width * self.pipe.vae_scale_factor, height * self.pipe.vae_scale_factor

    @torch.no_grad()
    def render(
        self,
        tokens: Tensor,
        null_tokens: Tensor | None,
        settings: RenderSettings | None = None,
        *,
        seeds: Sequence[int],
        init_image: Image.Image | None = None,
        progress: Progress | None = None,
        **changes: Any,
    ) -> list[Image.Image]:
        """One picture per row of tokens (B, T, D), RGB.

        null_tokens (1 or B, T', D) serve the unconditional half; None gives both halves the same tokens.
        seeds: one per row; a row's noise depends on its own seed alone, whatever the batch. `changes` replace
        single settings (`steps=20`). With `init_image` and strength below 1, the run starts from that picture
        (SDEdit, arXiv 2108.01073). Raises PitError for tokens, seeds and settings that do not fit.
        """
        settings = replace(settings or RenderSettings(), **changes)
        null = None if settings.same_tokens else null_tokens
        _check_rows(tokens, null, seeds)

        def shown(rows: slice) -> AbstractContextManager[None]:
            return self._tokens(tokens[rows], _rows_of(null, rows), settings)

        return self._batches(settings, seeds, shown, init_image, progress)

    @torch.no_grad()
    def draw(
        self, settings: RenderSettings, *, seeds: Sequence[int], progress: Progress | None = None
    ) -> list[Image.Image]:
        """One picture per seed of the prompt alone, RGB, through the UNet without any adapter."""
        _check_seeds(seeds)
        return self._batches(settings, seeds, lambda _rows: nullcontext(), None, progress)

    def _batches(
        self,
        settings: RenderSettings,
        seeds: Sequence[int],
        shown: Callable[[slice], AbstractContextManager[None]],
        init_image: Image.Image | None,
        progress: Progress | None,
    ) -> list[Image.Image]:
        """`shown` lets the UNet see what these rows' pictures are drawn of, beside the prompt."""
        size, text = self._checked_size(settings), self._text(settings)
        per_batch = _steps_taken(settings, init_image)
        starts = range(0, len(seeds), settings.batch)
        done: list[Image.Image] = []
        for number, start in enumerate(starts):
            rows = slice(start, start + settings.batch)
            after = _after_step(progress, number * per_batch, len(starts) * per_batch)
            with shown(rows):
                done += self._run(settings, text, list(seeds[rows]), size, init_image=init_image, after=after)
        return done

    def placed(self, lora: Lora) -> Placed:
        """Where a LoRA's layers go in this UNet and its adapter. Raises PitError as place_lora."""
        shapes = {name: tuple(p.shape) for name, p in self.unet.named_parameters()}
        return place_lora(lora, shapes, self.adapter)

    @contextmanager
    def under_loras(self, loras: Sequence[tuple[Lora, Strengths]]) -> Iterator[None]:
        """Inside, LoRAs change the UNet and the adapter; afterwards both are as before, bit for bit.

        The former numbers wait on the CPU meanwhile. Raises PitError as place_lora, before anything changes.
        """
        found = [(self.placed(lora), strengths) for lora, strengths in loras]
        adapter = self.adapter
        before: dict[nn.Parameter, Tensor] = {}
        try:
            for placed, strengths in found:
                self._add(placed, strengths, before)
            yield
        finally:
            self.adapter = adapter
            for parameter, data in before.items():
                parameter.data = data.to(parameter.device)

    @torch.no_grad()
    def _add(self, placed: Placed, strengths: Strengths, before: dict[nn.Parameter, Tensor]) -> None:
        for strength, layers in placed.by_strength(strengths).items():
            for name, layer in layers.items():
                parameter = self.unet.get_parameter(name)
                before.setdefault(parameter, parameter.data.cpu())
                parameter.data = patched_weight(parameter.data, layer, strength)
        of_adapter = strengths.whole * strengths.adapter
        if self.adapter is not None and placed.adapter and of_adapter:
            self.adapter = apply_ip_deltas(self.adapter, placed.lora, of_adapter)

    def _run(
        self,
        settings: RenderSettings,
        text: dict[str, Tensor],
        seeds: list[int],
        size: tuple[int, int],
        *,
        init_image: Image.Image | None,
        after: Callable[..., dict[str, Any]],
    ) -> list[Image.Image]:
        shared = {
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance,
            # On the CPU whatever the device: the same seed gives the same noise everywhere.
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "callback_on_step_end": after,
            **{key: value.expand(len(seeds), *value.shape[1:]) for key, value in text.items()},
        }
        if init_image is None:
            return self.pipe(width=size[0], height=size[1], **shared).images
        start = init_image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        return self._from_image()(image=[start] * len(seeds), strength=settings.strength, **shared).images

    def _from_image(self) -> Any:
        from diffusers import StableDiffusionXLImg2ImgPipeline

        pipe: Any = StableDiffusionXLImg2ImgPipeline(**self.pipe.components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @contextmanager
    def _tokens(self, tokens: Tensor, null: Tensor | None, settings: RenderSettings) -> Iterator[None]:
        """The UNet reads these tokens inside, and is as before afterwards, also after an error."""
        if self.adapter is None:
            raise PitError("This renderer has no IP-Adapter, so it draws no tokens; give it one.")
        fresh = installed_context(self.unet) is None
        context = install_ip_adapter(self.unet)
        # As the pipeline decides it; a distilled UNet that takes guidance as an input runs one half.
        guided = settings.guidance > 1 and self.unet.config.time_cond_proj_dim is None
        device, order, before = next(self.unet.parameters()).device, context.order, list(context.sources)
        try:
            # K and V are computed at the first step of the batch and kept for the others.
            context.add(
                tokens.to(device),
                null.to(device) if guided and null is not None else None,
                weight=settings.weight,
                adapter=self.adapter,
            )
            context.order = ("uncond", "cond") if guided else ("cond",)
            yield
        finally:
            context.sources[:], context.order = before, order
            if fresh:
                uninstall_ip_adapter(self.unet)

    def _text(self, settings: RenderSettings) -> dict[str, Tensor]:
        """Embeddings of prompt and negative, (1, ...) each, as the pipeline takes them."""
        device, dtype = self.pipe._execution_device, self.unet.dtype
        negative = settings.negative or ""
        if self._encode_prompt is not None:
            embeds, pooled = self._encode_prompt([settings.prompt, negative])
            parts = (embeds[:1], embeds[1:], pooled[:1], pooled[1:])
        else:
            parts = self.pipe.encode_prompt(
                settings.prompt, negative_prompt=negative, do_classifier_free_guidance=True
            )
        if settings.negative is None:
            parts = (parts[0], torch.zeros_like(parts[1]), parts[2], torch.zeros_like(parts[3]))
        names = (
            "prompt_embeds",
            "negative_prompt_embeds",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )
        return {name: part.to(device, dtype) for name, part in zip(names, parts, strict=True)}

    def _checked_size(self, settings: RenderSettings) -> tuple[int, int]:
        width, height = settings.size or self.default_size
        step = self.pipe.vae_scale_factor
        if width < step or height < step or width % step or height % step:
            raise PitError(f"Expected a picture size in multiples of {step} px, got {width} x {height}.")
        return width, height


# loading


def load_renderer(
    sdxl: str | os.PathLike[str],
    adapter: IPAdapter | None,
    *,
    config: str | os.PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Renderer:
    """A renderer from local files only: a diffusers folder, or one .safetensors checkpoint.

    A single file holds no tokenizers; `config` names a local diffusers folder with SDXL's settings and
    tokenizers (its weights are not needed). Raises PitError for what is missing, damaged or no SDXL.
    """
    path = Path(sdxl)
    layers = layers_on_disk(path)
    if adapter is not None:
        adapter.layers.check_fits(layers, adapter.name)
    pipe = load_folder(path, dtype) if path.is_dir() else load_single_file(path, config, dtype)
    _refuse_gaps(pipe, path)
    return Renderer(pipe.to(device), adapter)


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The SDXL pipeline in a diffusers folder. Raises PitError when it is another model or incomplete."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    check_folder(folder)
    ours: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
    theirs: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    models = {
        "unet": load_part(UNet2DConditionModel, folder / "unet", **ours),
        "vae": load_part(AutoencoderKL, folder / "vae", **ours),
        "text_encoder": load_part(CLIPTextModel, folder / "text_encoder", **theirs),
        "text_encoder_2": load_part(CLIPTextModelWithProjection, folder / "text_encoder_2", **theirs),
    }
    with _plain_errors(folder):
        return StableDiffusionXLPipeline.from_pretrained(
            str(folder), **models, local_files_only=True, add_watermarker=False
        )


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """One part of a diffusers folder, from local files alone; `kind` is its class, `options` go to it.

    The libraries fill in random numbers for weights that are not there. Raises PitError for them, and for a
    folder that is missing, damaged or of another class.
    """
    if not folder.is_dir():
        raise PitError(f"'{folder.parent}' lacks the folder {folder.name}, which holds its {kind.__name__}.")
    is_model = issubclass(kind, nn.Module)
    if is_model:
        options |= {"output_loading_info": True, **_variant(folder)}
    try:
        loaded = kind.from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # the libraries have no common type for bad folders
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise PitError(f"'{folder}' cannot be loaded as {kind.__name__}: {first[0][:200]}") from error
    if not is_model:
        return loaded
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise PitError(
            f"'{folder}' lacks {len(missing)} weights of its {kind.__name__}, such as {missing[0]}."
        )
    return model


def _variant(folder: Path) -> dict[str, str]:
    """Folders that hold only half precision files are read from these."""
    names = {path.name.split(".")[0] for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")}
    halves = [path for name in names for path in folder.glob(f"{name}.fp16.safetensors")]
    full = [path for name in names for path in folder.glob(f"{name}.safetensors*")]
    full += [path for name in names for path in folder.glob(f"{name}.bin*")]
    return {"variant": "fp16"} if halves and not full else {}


def load_single_file(
    path: Path, config: str | os.PathLike[str] | None, dtype: torch.dtype = torch.float32
) -> Any:
    """The SDXL pipeline in one .safetensors checkpoint, with the settings and tokenizers of `config`."""
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from diffusers.utils import is_accelerate_available

    check_single_file(path)
    if config is None:
        raise PitError(
            f"'{path.name}' is a single file without settings and tokenizers; run 'pit download sdxl-config' "
            "(3 MB) and add --sdxl-config models/sdxl-config, or name another local diffusers folder of SDXL."
        )
    check_folder(Path(config))
    if not is_accelerate_available():
        # Without it diffusers fills weights that are not in the file with random numbers, unseen.
        raise PitError("A single file needs the package accelerate; install it, or give a diffusers folder.")
    options: dict[str, Any] = {"config": str(config), "local_files_only": True, "torch_dtype": dtype}
    models = {
        "unet": _single_part(UNet2DConditionModel, path, "unet", options),
        "vae": _single_part(AutoencoderKL, path, "vae", options),
    }
    with _plain_errors(path):
        return StableDiffusionXLPipeline.from_single_file(
            str(path), **models, **options, add_watermarker=False
        )


def _single_part(kind: Any, path: Path, part: str, options: Mapping[str, Any]) -> Any:
    """One of diffusers' own models out of a single file; it fails where weights are missing."""
    with _plain_errors(path):
        try:
            return kind.from_single_file(str(path), subfolder=part, **options)
        except (KeyError, NotImplementedError) as error:  # missed on conversion, or left without numbers
            named = f", such as {error.args[0]}" if isinstance(error, KeyError) else ""
            raise PitError(
                f"'{path}' lacks weights of its {part}{named}; give a complete SDXL checkpoint."
            ) from error


def check_folder(folder: Path) -> None:
    """Raise PitError unless this is a diffusers folder of the SDXL family with everything it names."""
    if not folder.is_dir():
        raise PitError(f"There is no folder '{folder}'; a diffusers folder of SDXL was expected.")
    index = folder / "model_index.json"
    if not index.is_file():
        raise PitError(f"'{folder}' is no diffusers folder: it has no model_index.json.")
    try:
        named = json.loads(index.read_text("utf-8"))
        kind = named["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PitError(f"'{index}' is damaged; fetch it again.") from error
    if not str(kind).startswith("StableDiffusionXL"):
        raise PitError(
            f"'{folder}' holds a {kind}, but an SDXL model (StableDiffusionXLPipeline) was expected."
        )
    parts = [
        name
        for name, entry in named.items()
        if not name.startswith("_") and isinstance(entry, list) and entry and entry[0] is not None
    ]
    missing = [name for name in parts if name not in ("watermarker",) and not (folder / name).is_dir()]
    if missing:
        raise PitError(f"'{folder}' is incomplete: its folder '{missing[0]}' is missing; fetch it again.")


def check_single_file(path: Path) -> dict[str, list[int]]:
    """The shapes in a whole safetensors checkpoint of the SDXL family, from its header alone.

    Raises PitError for a file that is missing, damaged, cut short, or another model.
    """
    from safetensors import SafetensorError, safe_open

    path = existing_file(path)
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise PitError(f"'{path.name}' is empty; its download probably failed, so fetch it again.")
    if start[8:9] != b"{":
        raise PitError(
            f"'{path.name}' is no safetensors file; an SDXL checkpoint ending in .safetensors or a diffusers "
            "folder was expected."
        )
    try:
        with safe_open(str(path), framework="pt") as opened:
            shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise PitError(f"'{path.name}' is damaged or cut short; fetch it again.") from error
    if not any(key.startswith("model.diffusion_model.") for key in shapes):
        raise PitError(f"'{path.name}' is no Stable Diffusion checkpoint; an SDXL model was expected.")
    if not any(key.startswith("conditioner.embedders.1.") for key in shapes):
        raise PitError(f"'{path.name}' is a Stable Diffusion checkpoint, but not of the SDXL family.")
    if not any(key.startswith("first_stage_model.") for key in shapes):
        raise PitError(f"'{path.name}' holds no VAE; give a complete SDXL checkpoint.")
    for part, key in TEXT_ENCODER_KEYS.items():
        if key not in shapes:
            raise PitError(f"'{path.name}' lacks {key} of its {part}; give a complete SDXL checkpoint.")
    return shapes


def layers_on_disk(sdxl: str | os.PathLike[str]) -> list[AttentionLayer]:
    """The UNet's cross-attention layers, without loading it: for checks before anything heavy.

    Raises PitError as loading does.
    """
    path = Path(sdxl)
    if not path.is_dir():
        shapes = check_single_file(path)
        return layers_of_ldm_shapes(
            {k: s for k, s in shapes.items() if k.startswith("model.diffusion_model.")}
        )
    check_folder(path)
    config = path / "unet" / "config.json"
    try:
        return layers_of_config(json.loads(config.read_text("utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PitError(f"'{config}' is missing or damaged; fetch it again.") from error


def check_adapter_fits(unet: Any, adapter: IPAdapter) -> None:
    """Raise PitError, naming both families, unless the adapter's layers are those of the UNet."""
    adapter.layers.check_fits(layers_of_unet(unet), adapter.name)


def _refuse_gaps(pipe: Any, path: Path) -> None:
    """diffusers leaves parameters that a file lacks without numbers."""
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, part)
        if model is None:
            continue
        empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if empty:
            raise PitError(
                f"'{path}' lacks {len(empty)} weights of its {part}, such as {empty[0]}; give a complete one."
            )


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """diffusers' many kinds of failure on damaged or foreign files as one sentence."""
    try:
        yield
    except PitError:
        raise
    except Exception as error:  # the libraries below have no common type of error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise PitError(f"'{path}' cannot be loaded as SDXL: {lines[0][:200].rstrip('.')}.") from error


# small checks


def _check_rows(tokens: Tensor, null: Tensor | None, seeds: Sequence[int]) -> None:
    if tokens.ndim != 3 or not len(tokens):
        raise PitError(f"Expected tokens of shape (pictures, tokens, width), got {tuple(tokens.shape)}.")
    if len(seeds) != len(tokens):
        raise PitError(f"Expected one seed per picture, got {len(seeds)} for {len(tokens)}.")
    if null is not None and (null.ndim != 3 or null.shape[0] not in (1, len(tokens))):
        raise PitError(f"Expected null tokens of 1 or {len(tokens)} rows, got the shape {tuple(null.shape)}.")
    for name, values in (("tokens", tokens), ("null tokens", null)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise PitError(f"The {name} hold NaN or infinite numbers; check what made them.")
    _check_seeds(seeds)


def _check_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise PitError(f"Expected seeds that are whole numbers from 0 to 2^64 - 1, got {seed!r}.")


def _rows_of(null: Tensor | None, rows: slice) -> Tensor | None:
    return null if null is None or len(null) == 1 else null[rows]


def _steps_taken(settings: RenderSettings, init_image: Image.Image | None) -> int:
    return settings.steps if init_image is None else max(1, int(settings.steps * settings.strength))


def _after_step(progress: Progress | None, before: int, total: int) -> Callable[..., dict[str, Any]]:
    def after(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not bool(torch.isfinite(tensors["latents"]).all()):
            raise PitError(
                f"The picture turned into NaN at step {step + 1}: the numbers overflow; use --dtype float32 "
                "or bfloat16, or a smaller weight or guidance."
            )
        if progress is not None:
            progress(before + step + 1, total)
        return tensors

    return after
