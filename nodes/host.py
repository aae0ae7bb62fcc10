"""The only file that knows ComfyUI's internals: models and their patching, folders, progress, interrupts."""

from __future__ import annotations

import copy
import inspect
import json
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ..pit_core.diptych.flux_keys import to_published
from ..pit_core.errors import PitError
from ..pit_core.files import hash_tensors, inside
from ..pit_core.ip_adapter.adapter import IPAdapter
from ..pit_core.ip_adapter.checkpoint import check_family, load_ip_adapter
from ..pit_core.ip_adapter.layers import AttentionLayer, layers_of_ldm_shapes
from ..pit_core.ip_adapter.tokens import IPTokens
from ..pit_core.ip_adapter.weights import LayerWeight
from ..pit_core.ip_prior.checkpoint import load_prior
from ..pit_core.ip_prior.info import PriorInfo
from ..pit_core.ip_prior.model import IPPrior
from ..pit_core.lora.formats import to_kohya
from ..pit_core.lora.ip_deltas import with_layers
from ..pit_core.lora.keys import kohya_name
from ..pit_core.lora.model import Lora, LoraLayer
from ..pit_core.lora.placing import Placed, Strengths
from .attention import (
    COND,
    HALVES,
    UNCOND,
    VIEW,
    Application,
    Area,
    KeysValues,
    StackedAttention,
    View,
    stacked,
)
from .panels import Panels

KEY = "piece_it_together"
PANELS = f"{KEY}_panels"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
TOKEN_FILES = {".safetensors"}
TOKENS = "ip_tokens"
DIRECTIONS = "ip_directions"
LORAS = "loras"
EVERYTHING = 1e30  # bytes, more than any device has
CUT_OUT = "cut_out"
FLUX_BLOCKS = {"double": 19, "single": 38}
KEPT_RUNS = 4  # keys and values kept per adapter, so that another weight does not compute them again

# folders


def register_folders() -> None:
    """Make our folders known, beside whatever other packs and extra_model_paths.yaml have put there."""
    models, output = Path(folder_paths.models_dir), Path(folder_paths.get_output_directory())
    for name, place, suffixes in (
        ("ipadapter", models / "ipadapter", WEIGHTS),
        ("ip_prior", models / "ip_prior", WEIGHTS),
        (TOKENS, output / TOKENS, TOKEN_FILES),
        (DIRECTIONS, models / DIRECTIONS, WEIGHTS),
        (CUT_OUT, models / CUT_OUT, WEIGHTS),
        (DIRECTIONS, output / DIRECTIONS, WEIGHTS),
        (LORAS, output / LORAS, WEIGHTS),  # the host adds it itself, when it starts as a program
    ):
        folder_paths.add_model_folder_path(name, str(place))
        paths, known = folder_paths.folder_names_and_paths[name]
        if not known:  # an empty set stands for every file
            folder_paths.folder_names_and_paths[name] = (paths, set(suffixes))


def files_in(folder: str) -> list[str]:
    """The files of a folder as a drop-down lists them."""
    return list(folder_paths.get_filename_list(folder))


def folders_in(folder: str) -> list[str]:
    """The model folders, as transformers writes them, in a folder of models."""
    return sorted(_model_folders(folder))


def folder_of(folder: str, name: str) -> Path:
    """The model folder that a drop-down's entry stands for. Raises PitError where it is gone."""
    found = _model_folders(folder).get(name)
    if found is None:
        known = ", ".join(map(str, folder_paths.get_folder_paths(folder)))
        raise PitError(f"There is no model folder {name[:100]!r} in {known}; put it there, or take another.")
    return found


def _model_folders(folder: str) -> dict[str, Path]:
    places = reversed(folder_paths.get_folder_paths(folder))  # of two with one name the first place counts
    return {path.parent.name: path.parent for place in places for path in Path(place).glob("*/config.json")}


def path_of(folder: str, name: str) -> Path:
    """The file that a drop-down's entry stands for. Raises PitError where it is gone.

    Models may be links to another disk, as the host lists them. In a folder that workflows write to, no name
    leads elsewhere.
    """
    if folder == TOKENS:
        places = [inside(place, name.replace("\\", "/")) for place in folder_paths.get_folder_paths(folder)]
        found = next((path for path in places if path.is_file()), None)
    else:
        found = folder_paths.get_full_path(folder, name)
    if found is None:
        known = ", ".join(map(str, folder_paths.get_folder_paths(folder)))
        raise PitError(f"There is no file {name[:100]!r} in {known}; put it there, or choose another one.")
    return Path(found)


def state_of(folder: str, name: str | None, *beside: str) -> str:
    """What changes when the file does, or one of those `beside` it ("{stem}.yaml"), for the host's cache."""
    if not name:
        return ""
    try:
        path = path_of(folder, name)
    except PitError:
        return "missing"
    return " ".join(map(_stamp, [path, *(path.with_name(each.format(stem=path.stem)) for each in beside)]))


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return f"{stat.st_mtime_ns}-{stat.st_size}"


def new_file(kind: str, prefix: str) -> tuple[Path, str]:
    """A path that is free, numbered by the host's own rule, and its name below the output folder `kind`."""
    folder = Path(folder_paths.get_output_directory()) / kind
    inside(folder, prefix)
    try:
        place, name, number, below, _ = folder_paths.get_save_image_path(prefix, str(folder))
    except OSError as error:
        reason = error.strerror or str(error)
        raise PitError(f"The folder '{folder}' cannot be written to ({reason}); make it writable.") from error
    file = f"{name}_{number:05}_.safetensors"
    return Path(place) / file, f"{below}/{file}" if below else file


# progress


def progress(total: int) -> Callable[[int], None]:
    """A function to call with the number of steps done; it moves the bar, and stops when the user asked."""
    bar = comfy.utils.ProgressBar(total)

    def report(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


# models of ours, under the host's memory management


class Managed:
    """A module that the host loads to the device, offloads and frees like its own models."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.patcher = comfy.model_patcher.ModelPatcher(
            module,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def load(self) -> torch.device:
        """Bring it to the device, as far as memory allows, and say which device that is."""
        comfy.model_management.load_model_gpu(self.patcher)
        return self.patcher.load_device

    def unload(self) -> None:
        """Take it off the device, if it is there."""
        loaded = comfy.model_management.current_loaded_models
        others = [each for each in loaded if each.model is not self.patcher]
        if len(others) < len(loaded):
            comfy.model_management.free_memory(EVERYTHING, self.patcher.load_device, others)

    def patched(self, changes: Mapping[str, LoraLayer], strength: float) -> Managed:
        """The same module under a LoRA; the host puts the changes in and out as it loads either."""
        other = copy.copy(self)
        other.patcher = self.patcher.clone()
        _add_patches(other.patcher, changes, strength)
        return other


def load_module(*modules: torch.nn.Module) -> None:
    """Bring modules that are used once to the device, and make room there for them."""
    Managed(torch.nn.ModuleList(modules)).load()


class ManagedAdapter:
    """An IP-Adapter. Its projection and its layers are separate models: neither is needed with the other."""

    def __init__(self, adapter: IPAdapter) -> None:
        self.adapter = adapter
        self.projector = Managed(self.adapter.image_proj)
        self.layers = Managed(self.adapter.ip_adapter)
        self._kept: OrderedDict[tuple[str, torch.dtype], KeysValues] = OrderedDict()

    def __str__(self) -> str:
        return self.adapter.name

    def patched(self, placed: Placed, strength: float) -> ManagedAdapter:
        """This adapter with a LoRA's changes in its layers, whose weights the two share."""
        other = copy.copy(self)
        other.adapter = with_layers(self.adapter, self.adapter.layers, placed.lora, strength)
        changes = {key.removeprefix("ip_adapter."): layer for key, layer in placed.adapter.items()}
        other.layers = self.layers.patched(changes, strength)
        other._kept = OrderedDict()
        return other

    @torch.no_grad()
    def keys_values(self, key: str, tokens: Tensor, dtype: torch.dtype) -> KeysValues:
        """K and V of every layer on the CPU, (B, T, width) each; `key` names the tokens for the cache."""
        place = (key, dtype)
        if place not in self._kept:
            device = self.layers.load()
            like = torch.empty(0, device=device, dtype=torch.float32)
            layers = self.adapter.layers
            found = {n: layers.keys_values(n, tokens.to(like), like) for n in range(len(layers))}
            self._kept[place] = {n: (_stored(k, dtype), _stored(v, dtype)) for n, (k, v) in found.items()}
        self._kept.move_to_end(place)
        while len(self._kept) > KEPT_RUNS:
            self._kept.popitem(last=False)
        return self._kept[place]


def load_adapter(path: Path) -> ManagedAdapter:
    """An adapter of any released layout, on the host's layers. Raises PitError as load_ip_adapter does."""
    return ManagedAdapter(load_ip_adapter(path, operations=comfy.ops.manual_cast))


class ManagedPrior:
    """An IP-Prior and what is known of it."""

    def __init__(self, path: Path) -> None:
        self.prior: IPPrior
        self.info: PriorInfo
        self.prior, self.info = load_prior(path, operations=comfy.ops.manual_cast)
        self.name = f"'{path.name}'"
        self.managed = Managed(self.prior)


def _stored(t: Tensor, dtype: torch.dtype) -> Tensor:
    """On the CPU, in half precision for a model that runs in it, unless the numbers do not fit."""
    half = t.to(torch.float16) if dtype != torch.float32 else t
    return (half if bool(torch.isfinite(half).all()) else t).to("cpu")


# the host's image encoder

_encoder_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next_number = count()


class HostEncoder:
    """CLIP_VISION with the face of `pit_core`'s ImageEncoder. Raises PitError for what is no CLIP encoder."""

    def __init__(self, clip_vision: Any) -> None:
        self.clip_vision = clip_vision
        tower = getattr(getattr(clip_vision, "model", None), "vision_model", None)
        shapes = {} if tower is None else {k: tuple(p.shape) for k, p in clip_vision.model.named_parameters()}
        norm = shapes.get("vision_model.post_layernorm.weight")
        projection = shapes.get("visual_projection.weight")
        if norm is None or projection is None:
            raise PitError(
                "clip_vision is not a CLIP image encoder with a projection; load CLIP ViT-H/14 (for most "
                "adapters) with 'Load CLIP Vision'."
            )
        self.hidden_width, self.projection_dim = int(norm[0]), int(projection[0])
        self.image_size = int(clip_vision.image_size)
        self.mean, self.std = tuple(clip_vision.image_mean), tuple(clip_vision.image_std)
        self.name = "clip_vision"
        self.number = _encoder_numbers.setdefault(clip_vision.model, next(_next_number))

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels (B, 3, S, S) -> penultimate states (B, N, W), embedding (B, P), float32."""
        comfy.model_management.load_model_gpu(self.clip_vision.patcher)
        out = self.clip_vision.model(
            pixel_values=pixels.to(self.clip_vision.load_device), intermediate_output=-2
        )
        return out[1].float(), out[2].float()


# applying tokens to a model


def layers_of_model(model: Any) -> list[AttentionLayer]:
    """The text cross-attention layers of a MODEL. Raises PitError for a model that has none."""
    shapes = {name: tuple(p.shape) for name, p in _network(model).named_parameters()}
    return layers_of_ldm_shapes(shapes)


def _network(model: Any) -> torch.nn.Module:
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if network is None:
        raise PitError(f"model is {type(model).__name__}, no diffusion model; connect a MODEL output.")
    return network


def check_model(model: Any, adapter: ManagedAdapter) -> list[AttentionLayer]:
    """The layers of a model that this adapter fits. Raises PitError that names both families."""
    layers = layers_of_model(model)
    check_family(adapter.adapter, layers)
    return layers


def make_applications(
    model: Any,
    adapter: ManagedAdapter,
    pieces: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    weights: Mapping[int, LayerWeight],
    **options: Any,
) -> list[Application]:
    """One Application for each (tokens, unconditional tokens, mask); options are Application's.

    Keys and values are computed here, once. Sampling has no use for the adapter's layers, which therefore
    leave the device.
    """
    try:
        return [_application(model, adapter, *piece, weights, options) for piece in pieces]
    finally:
        adapter.layers.unload()


def _application(
    model: Any,
    adapter: ManagedAdapter,
    tokens: Tensor,
    uncond: Tensor,
    mask: Tensor | None,
    weights: Mapping[int, LayerWeight],
    options: Mapping[str, Any],
) -> Application:
    dtype = model.model_dtype()
    keys = [_token_key(adapter, t) for t in (tokens, uncond)]
    cond, other = (adapter.keys_values(k, t, dtype) for k, t in zip(keys, (tokens, uncond), strict=True))
    rest = {**options, "mask": None if mask is None else hash_tensors({"mask": mask})}
    key = "|".join([*keys, repr(sorted(weights.items())), repr(sorted(rest.items()))])
    source = (adapter.adapter.content_hash, tokens, uncond)
    return Application(key, cond, other, weights, mask=mask, source=source, **options)


def _token_key(adapter: ManagedAdapter, tokens: Tensor) -> str:
    return adapter.adapter.content_hash + IPTokens(tokens, tokens.shape[1]).content_hash()


def apply(model: Any, layers: Sequence[AttentionLayer], applications: Sequence[Application]) -> Any:
    """A clone of the model with more applications; the model itself stays as it is."""
    patched = model.clone()
    for application in applications:
        placed = _replacements(patched)
        for layer in layers:
            if layer.index not in application.weights:
                continue
            block, number, index = layer.comfy_block
            before = placed.get(layer.comfy_block, placed.get((block, number)))
            patch = stacked(layer.index, application, _attention, before)
            patched.set_model_attn2_replace(patch, block, number, index)
    _watch(patched)
    return patched


def _replacements(model: Any) -> dict[Any, Any]:
    options = model.model_options.get("transformer_options", {})
    return dict(options.get("patches_replace", {}).get("attn2", {}))


def applications_of(model: Any) -> Iterator[Application]:
    """What "Apply IP tokens" has put on a model, each once for every layer."""
    for patch in _replacements(model).values():
        if isinstance(patch, StackedAttention):
            yield from patch.applications


def with_adapter(model: Any, old: ManagedAdapter, new: ManagedAdapter) -> Any:
    """A clone of the model on which the tokens that were applied through one adapter go through the other."""
    patched = model.clone()
    made: dict[Application, Application] = {}
    for place, patch in _replacements(model).items():
        if not isinstance(patch, StackedAttention):
            continue
        applications = [_through(model, each, old, new, made) for each in patch.applications]
        again = StackedAttention(patch.n, applications, patch.attention, patch.before)
        patched.set_model_attn2_replace(again, *place)
    return patched


def _through(
    model: Any,
    application: Application,
    old: ManagedAdapter,
    new: ManagedAdapter,
    made: dict[Application, Application],
) -> Application:
    if application.source is None or application.source[0] != old.adapter.content_hash:
        return application
    if application not in made:
        _, tokens, uncond = application.source
        options = {"scaling": application.scaling, "span": application.span}
        pieces = [(tokens, uncond, application.mask)]
        made[application] = make_applications(model, new, pieces, application.weights, **options)[0]
    return made[application]


def _attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The host's own attention, called as its layer calls it, so that the result is the same bit for bit."""
    precision = options.get("attn_precision")
    return optimized_attention(
        q, k, v, options["n_heads"], attn_precision=precision, transformer_options=options
    )


def _watch(model: Any) -> None:
    kinds = comfy.patcher_extension.WrappersMP
    for kind, wrapper in ((kinds.PREDICT_NOISE, _tell_halves), (kinds.CALC_COND_BATCH, _tell_view)):
        model.remove_wrappers_with_key(kind, KEY)
        model.add_wrapper_with_key(kind, KEY, wrapper)
    cleanup = comfy.patcher_extension.CallbacksMP.ON_CLEANUP
    model.remove_callbacks_with_key(cleanup, KEY)
    model.add_callback_with_key(cleanup, KEY, _release)


def _release(model: Any) -> None:
    """After a run, also one that failed: nothing of ours stays on the device."""
    for application in applications_of(model):
        application.release()


# The wrappers' arguments are called as the host calls them: other packs may pass them on by name.


def _tell_halves(
    executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None = None
) -> Any:
    """Let tokens know which conditions are negative ones: not every guider puts the positive ones first."""
    groups = getattr(executor.class_obj, "conds", None) or {}
    halves = {
        entry["uuid"]: UNCOND if "negative" in name else COND
        for name, group in groups.items()
        for entry in group or ()
        if "uuid" in entry
    }
    return executor(x, timestep, _with(model_options, HALVES, halves), seed)


def _tell_view(
    executor: Any,
    model: Any,
    conds: Sequence[Any],
    x_in: Tensor,
    timestep: Tensor,
    model_options: dict[str, Any],
) -> Any:
    """Let tokens and masks know what part of the latents the model is shown, and at what noise level."""
    shape, window = _window(model_options.get("transformer_options", {}).get("context_window"), x_in)
    entries = [entry for group in conds if group is not None for entry in group]
    areas = {e["uuid"]: tuple(e["area"]) for e in entries if e.get("area") is not None and "uuid" in e}
    boxes = {uuid: _within(area, x_in.shape[-2:]) for uuid, area in areas.items() if len(area) == 4}
    view = View(shape, timestep, boxes, window, model.model_sampling.percent_to_sigma)
    return executor(model, conds, x_in, timestep, _with(model_options, VIEW, view))


def _with(model_options: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    told = {**model_options.get("transformer_options", {}), key: value}
    return {**model_options, "transformer_options": told}


def _window(window: Any, x: Tensor) -> tuple[tuple[int, ...], tuple[int, tuple[int, ...]] | None]:
    """The whole latents' shape, and which part of them `x` is, out of the host's context window."""
    shape = tuple(x.shape)
    if window is None:
        return shape, None
    whole = (*shape[: window.dim], window.total_frames, *shape[window.dim + 1 :])
    shown = window.get_tensor(torch.arange(window.total_frames), dim=0)
    return whole, (window.dim, tuple(shown.tolist()))


def _within(area: Sequence[int], latent: Sequence[int]) -> Area:
    height, width, top, left = (int(value) for value in area)
    return min(height, latent[0] - top), min(width, latent[1] - left), top, left


# the panels of a diptych


def flux_blocks(model: Any) -> dict[str, int]:
    """How many double and single blocks a MODEL has; Flux's own where it does not tell.

    Raises PitError for what is no model, and for a UNet, whose attention is another.
    """
    network = _network(model)
    if hasattr(network, "input_blocks"):
        raise PitError("model is a UNet, as SDXL and SD1.5 are; diptychs need a model of the Flux family.")
    lists = {kind: getattr(network, f"{kind}_blocks", None) for kind in FLUX_BLOCKS}
    return {kind: FLUX_BLOCKS[kind] if found is None else len(found) for kind, found in lists.items()}


def apply_panels(model: Any, panels: Panels) -> Any:
    """A clone of the model that looks harder at the left panel; of several uses the last one that is active
    at a step and block counts."""
    patched = model.clone()
    _watch(patched)
    kinds = comfy.patcher_extension.WrappersMP
    patched.add_wrapper_with_key(kinds.PREDICT_NOISE, PANELS, partial(_count_step, panels))
    patched.add_wrapper_with_key(kinds.DIFFUSION_MODEL, PANELS, partial(_look_across, panels))
    cleanup = comfy.patcher_extension.CallbacksMP.ON_CLEANUP
    patched.add_callback_with_key(cleanup, PANELS, partial(_finish, panels))
    return patched


def _count_step(panels: Panels, executor: Any, *args: Any, **named: Any) -> Any:
    panels.step()
    return executor(*args, **named)


def _finish(panels: Panels, _model: Any) -> None:
    panels.finish()


def _look_across(panels: Panels, executor: Any, *args: Any, **named: Any) -> Any:
    """Around one forward pass. Models of the family differ in the order of what they take, not in names."""
    call = inspect.signature(executor.original).bind(*args, **named)
    options = call.arguments.get("transformer_options") or {}
    patch = getattr(executor.class_obj, "patch_size", 2)
    size = [-(-side // patch) for side in call.arguments["x"].shape[-2:]]
    override = panels.override(options, size, call.arguments["context"].shape[1])
    if override is None:
        return executor(*args, **named)
    call.arguments["transformer_options"] = override.options(options)
    out = executor(*call.args, **call.kwargs)
    panels.asked(override)
    return out


# LoRAs


def lora_keys(model: Any) -> dict[str, str]:
    """The weights of a MODEL that a LoRA can change: their names in kohya's layout -> the host's.

    Raises PitError for what is no model.
    """
    _network(model)
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    return {name: key for name, key in names.items() if name.startswith("lora_unet_") and type(key) is str}


def shapes_of(model: Any, keys: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a MODEL's weights under the names of `lora_keys`."""
    weights = model.model.state_dict()
    return {name: tuple(weights[key].shape) for name, key in keys.items() if key in weights}


def add_lora(model: Any, placed: Placed, keys: Mapping[str, str], strengths: Strengths) -> Any:
    """A clone of the model under a LoRA, beside whatever other LoRAs and patches there are."""
    patched = model.clone()
    for strength, layers in placed.by_strength(strengths).items():
        _add_patches(patched, {keys[name]: layer for name, layer in layers.items()}, strength)
    return patched


def _add_patches(patcher: Any, changes: Mapping[str, LoraLayer], strength: float) -> None:
    """Weight's key -> what changes it, in the host's own form of it; every one has to be taken."""
    if not changes:
        return
    lora = Lora({layer.module: layer for layer in changes.values()})
    names = {kohya_name(layer.module): key for key, layer in changes.items()}
    taken = patcher.add_patches(comfy.lora.load_lora(to_kohya(lora), names), strength)
    if missing := set(changes) - set(taken):
        raise PitError(
            f"This ComfyUI takes only {len(taken)} of {len(changes)} changes of weights (not "
            f"{min(missing)}); update the pack."
        )


# small models out of the host's own classes


def build_sdxl(config: Mapping[str, Any], load: Callable[[], dict[str, Tensor]]) -> Any:
    """A MODEL of the SDXL family at any size: diffusers' unet/config.json and its weights.

    `load` brings the weights; the host calls this function again when it needs an independent copy.
    """
    patcher, names = empty_sdxl(config)
    weights = {names[key]: t.float() for key, t in load().items()}
    _fill(patcher.model.diffusion_model, weights, "unet")
    patcher.cached_patcher_init = (_rebuild_sdxl, (config, load))
    return patcher


def empty_sdxl(config: Mapping[str, Any]) -> tuple[Any, dict[str, str]]:
    """A MODEL whose weights are yet to be filled in, and diffusers' name of each weight -> the host's."""
    plan = _sdxl_plan(config)
    family = comfy.supported_models.SDXL(plan)
    family.unet_config.update(num_heads=-1, num_head_channels=_head_width(config))
    family.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.unet_offload_device()
    model = family.get_model({}, "", device=device)
    set_groups(model.diffusion_model, config["norm_num_groups"])
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=device
    )
    return patcher, comfy.utils.unet_to_diffusers(plan)


def _rebuild_sdxl(config: Mapping[str, Any], load: Callable[[], dict[str, Tensor]], **_options: Any) -> Any:
    """As build_sdxl; the host names the kind of patcher that it wants, and ours is of the plain kind."""
    return build_sdxl(config, load)


def build_flux(config: Mapping[str, Any], shift: float, load: Callable[[], dict[str, Tensor]]) -> Any:
    """A MODEL of the Flux family at any size: diffusers' transformer/config.json and its weights.

    shift: mu of the noise levels, which depends on the size of the pictures. `load` as in build_sdxl.
    """
    family = comfy.supported_models.Flux(_flux_plan(config))
    family.sampling_settings["shift"] = shift
    family.set_inference_dtype(torch.float32, None)
    device = comfy.model_management.unet_offload_device()
    model = family.get_model({}, "", device=device)
    weights = {key: t.float() for key, t in to_published(load()).items()}
    _fill(model.diffusion_model, family.process_unet_state_dict(weights), "fill model")
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=device
    )
    patcher.cached_patcher_init = (_rebuild_flux, (config, shift, load))
    return patcher


def _rebuild_flux(
    config: Mapping[str, Any], shift: float, load: Callable[[], dict[str, Tensor]], **_options: Any
) -> Any:
    """As _rebuild_sdxl."""
    return build_flux(config, shift, load)


def build_vae(config: Mapping[str, Any], weights: dict[str, Tensor]) -> Any:
    """A VAE out of diffusers' vae/config.json and its weights."""
    weights = {**_quant_convolutions(config), **weights}
    widths = config["block_out_channels"]
    ddconfig = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"params": {"ddconfig": ddconfig, "embed_dim": config["latent_channels"]}}
    vae = comfy.sd.VAE(sd={k: t.float() for k, t in weights.items()}, config=params, dtype=torch.float32)
    vae.latent_channels = config["latent_channels"]
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(widths) - 1)
    set_groups(vae.first_stage_model, config["norm_num_groups"])
    return vae


def build_clip_vision(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """CLIP_VISION out of transformers' settings and weights."""
    with tempfile.TemporaryDirectory() as folder:  # the host takes a path; from 0.33 on a dict too
        path = Path(folder) / "config.json"
        path.write_text(json.dumps({"model_type": "clip_vision_model", "num_channels": 3, **config}), "utf-8")
        encoder = comfy.clip_vision.ClipVisionModel(str(path))
    _fill(encoder.model, weights, "image encoder")
    return encoder


def build_clip(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenize: Callable[[str], list[int]],
    special: Mapping[str, int],
) -> Any:
    """CLIP out of one text tower with SDXL's habits: penultimate states, projected pooled output.

    tokenize: a text without weights -> ids alone, neither started, ended nor padded. special: the ids of
    "start", "end" and "pad".
    """
    length = config["max_position_embeddings"]

    class Tower(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                max_length=length,
                layer="hidden",
                layer_idx=-2,
                textmodel_json_config=dict(config),
                dtype=dtype,
                special_tokens=dict(special),
                layer_norm_hidden_state=False,
                return_projected_pooled=True,
                model_options={**(model_options or {}), "model_name": "miniature"},
            )
            vocabulary, width = config["vocab_size"], config["hidden_size"]
            table = self.operations.Embedding(vocabulary, width, dtype=dtype, device=device)
            self.transformer.set_input_embeddings(table)

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                model_options=model_options or {},
                clip_name="miniature",
                clip_model=Tower,
            )

    class Tokenizer:
        def __init__(self, **_options: Any) -> None:
            pass

        def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_options: Any) -> Any:
            return {"miniature": weighted_tokens(text, tokenize, special, length, return_word_ids)}

        def untokenize(self, pairs: Any) -> Any:
            return [(pair, str(pair[0])) for pair in pairs]

        def state_dict(self) -> dict[str, Any]:
            return {}

    target = comfy.supported_models_base.ClipTarget(Tokenizer, Model)
    clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32})
    _fill(clip.cond_stage_model.clip_miniature.transformer, weights, "text encoder")
    return clip


def weighted_tokens(
    text: str,
    tokenize: Callable[[str], list[int]],
    special: Mapping[str, int],
    length: int,
    word_ids: bool = False,
) -> list[list[tuple[Any, ...]]]:
    """A prompt with "(words:1.2)" weights as the host's sections of (id, weight), each started and padded."""
    escaped = comfy.sd1_clip.escape_important(text)
    pairs: list[tuple[Any, ...]] = []
    for number, (words, weight) in enumerate(comfy.sd1_clip.token_weights(escaped, 1.0), 1):
        plain = comfy.sd1_clip.unescape_important(words)
        pairs += [(token, weight, number) for token in tokenize(plain)]
    room = length - 2
    sections = [pairs[at : at + room] for at in range(0, max(1, len(pairs)), room)]
    full = [[(special["start"], 1.0, 0), *section, (special["end"], 1.0, 0)] for section in sections]
    full = [[*row, *[(special["pad"], 1.0, 0)] * (length - len(row))] for row in full]
    return full if word_ids else [[entry[:2] for entry in row] for row in full]


def set_groups(model: torch.nn.Module, groups: int) -> None:
    """The host's classes have 32 groups in every group norm, which small models do not."""
    for module in model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = groups


def _fill(module: torch.nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Load every weight: the host's layers leave what is not loaded uninitialised."""
    missing, unexpected = module.load_state_dict(dict(weights), strict=False)
    missing = [key for key in missing if key != "logit_scale" and not key.endswith("position_ids")]
    unexpected = [key for key in unexpected if not key.endswith("position_ids")]
    if missing or unexpected:
        raise PitError(
            f"The miniature's {what} does not fit this ComfyUI (missing {missing[:3]}, unknown "
            f"{unexpected[:3]}); update the pack."
        )


def _quant_convolutions(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What changes nothing, for a VAE without them, as Flux's: the host's class for a config has them."""
    channels, found = config["latent_channels"], {}
    for name, wide in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if not config.get(f"use_{name}", True):
            found[f"{name}.weight"] = torch.eye(wide)[..., None, None]
            found[f"{name}.bias"] = torch.zeros(wide)
    return found


def _flux_plan(config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' transformer/config.json in the host's words, which count channels before 2 x 2 patches."""
    heads = config["num_attention_heads"]
    return {
        "image_model": "flux",
        "in_channels": config["in_channels"] // 4,
        "out_channels": (config["out_channels"] or config["in_channels"]) // 4,
        "patch_size": 2,
        "vec_in_dim": config["pooled_projection_dim"],
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": heads * config["attention_head_dim"],
        "num_heads": heads,
        "mlp_ratio": 4.0,
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": config["guidance_embeds"],
        "txt_ids_dims": [],
    }


def _sdxl_plan(config: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' unet/config.json in the host's words."""
    widths, per_level = config["block_out_channels"], config["layers_per_block"]
    depths = config["transformer_layers_per_block"]
    with_text = ["CrossAttn" in kind for kind in config["down_block_types"]]
    used = [depth if text else 0 for depth, text in zip(_each(depths, widths), with_text, strict=True)]
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [per_level] * len(widths),
        "transformer_depth": [depth for depth in used for _ in range(per_level)],
        "transformer_depth_output": [depth for depth in used for _ in range(per_level + 1)],
        "transformer_depth_middle": _each(depths, widths)[-1],
        "context_dim": config["cross_attention_dim"],
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
        "num_classes": "sequential",
        "use_linear_in_transformer": True,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
    }


def _each(value: Any, widths: Sequence[int]) -> list[int]:
    return [value] * len(widths) if isinstance(value, int) else list(value)


def _head_width(config: Mapping[str, Any]) -> int:
    """diffusers calls the number of heads `attention_head_dim`."""
    heads = _each(config["attention_head_dim"], config["block_out_channels"])
    return config["block_out_channels"][-1] // heads[-1]
