"""The graphs with diptychs: a subject, a style or an edit on Flux, with a ControlNet or with Flux Fill."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from workflow_graphs import (
    CLIP_L,
    CONTROLNET,
    EXAMPLE,
    FILL,
    FLUX,
    FLUX_VAE,
    T5,
    T5_SMALL,
    Link,
    Shipped,
    Workflow,
)

STRENGTH = 1.3  # the paper's
WITH_FILL = 1.15  # Fill sees the left panel anyway
PAPER_CONTROL, PAPER_CFG, PAPER_GUIDANCE, FILL_GUIDANCE = 0.95, 3.5, 3.5, 30.0
TWIN = "flux_fill/diffusion_pytorch_model.safetensors"  # the miniature's file that its twins run with
SIDE = 128  # of the miniature's panels, in pixels


@dataclass(frozen=True)
class Flux:
    """Links to what a graph draws with; pictures: the miniature's samples; control: the ControlNet."""

    model: Link
    clip: Link
    vae: Link
    pictures: Link | None = None
    control: Link | None = None


# pieces


def flux_models(w: Workflow, fill: bool, small: bool = False) -> Flux:
    w.group("1. Models")
    if not w.full:
        flux = w.add("PiTMiniatureFlux")
        return Flux(flux[0], flux[1], flux[2], w.add("PiTMiniatureSDXL", "Sample pictures")[5])
    model = w.add(
        "UNETLoader",
        "Flux Fill" if fill else "Flux",
        unet_name=FILL if fill else FLUX,
        weight_dtype="fp8_e4m3fn" if small else "default",
    )
    clip = w.add(
        "DualCLIPLoader",
        "Text encoders",
        clip_name1=CLIP_L,
        clip_name2=T5_SMALL if small else T5,
        type="flux",
        device="default",
    )
    vae = w.add("VAELoader", "VAE", vae_name=FLUX_VAE)
    if fill:
        return Flux(model[0], clip[0], vae[0])
    long = w.add("T5TokenizerOptions", "Texts of 512 tokens", clip=clip[0], min_padding=0, min_length=512)
    control = w.add("ControlNetLoader", "Inpainting ControlNet", control_net_name=CONTROLNET)
    return Flux(model[0], long[0], vae[0], control=control[0])


def picture_of(w: Workflow, flux: Flux, title: str, number: int) -> tuple[Link, Link | None]:
    """A picture, and where it is opaque: the user's own, or one of the samples, which stand on white."""
    if flux.pictures is None:
        loaded = w.add("LoadImage", title, image=EXAMPLE)
        return loaded[0], w.add("InvertMask", "What is opaque", mask=loaded[1])[0]
    taken = w.add("ImageFromBatch", title, image=flux.pictures, batch_index=number, length=1)
    w.add("PreviewImage", "The samples, numbered from 0", images=flux.pictures)
    return taken[0], None


def edited_picture(w: Workflow, flux: Flux) -> tuple[Link, Link]:
    """The picture that is edited, and the mask that is painted on it."""
    if flux.pictures is None:
        loaded = w.add("LoadImage", "Picture to edit, with a painted mask", 1, image=EXAMPLE)
        return loaded[0], loaded[1]
    taken = w.add("ImageFromBatch", "Picture to edit", 1, image=flux.pictures, batch_index=0, length=1)
    black = w.add("SolidMask", "The picture, black", 1, value=0.0, width=256, height=256)
    white = w.add("SolidMask", "The region, white", 1, value=1.0, width=160, height=200)
    mask = w.add(
        "MaskComposite", "Mask", 1, destination=black[0], source=white[0], x=48, y=40, operation="add"
    )
    return taken[0], mask[0]


def prepare(w: Workflow, picture: Link, mask: Link | None, mode: str, small: bool, **more: Any) -> Any:
    side, margin = (768, 8) if w.full else (SIDE, 0)
    sizes = {"width": side, "height": side, "reference_width": 512 if small else 0, "margin": margin}
    rest = {"fill_panel": False, "edit_context": 1.5} | ({"mask": mask} if mask else {})
    return w.add("PiTDiptychPrepare", column=1, image=picture, mode=mode, **sizes, **rest, **more)


def prompt(w: Workflow, task: str, subject: str, target: str) -> Link:
    template = "A diptych of {a_subject}; on the right, {target}"
    texts = {"task": task, "subject": subject, "target": target, "template": template}
    return w.add("PiTDiptychPrompt", **texts)[0]


def looking(w: Workflow, model: Link, layout: Link, strength: float, column: int = 0) -> Link:
    settings = {
        "strength": strength,
        "mode": "reference",
        "start_at": 0.0,
        "end_at": 1.0,
        "double_blocks": "all",
        "single_blocks": "all",
        "cond_only": False,
    }
    return w.add("PiTDiptychAttention", column=column, model=model, layout=layout, **settings)[0]


def drawn(w: Workflow, column: int, cfg: float, **links: Link) -> Link:
    steps = 30 if w.full else 25
    settings = {"seed": 7, "steps": steps, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return w.add("KSampler", column=column, cfg=cfg, **settings, **links)[0]


def taken_apart(w: Workflow, flux: Flux, latent: Link, layout: Link, prefix: str, edit: bool) -> None:
    decoded = w.add("VAEDecode", column=2, samples=latent, vae=flux.vae)
    w.add("PreviewImage", "Both panels", 2, images=decoded[0])
    crop = w.add("PiTDiptychCrop", column=3, image=decoded[0], layout=layout, feather=16)
    w.add("SaveImage", column=3, images=crop[2 if edit else 0], filename_prefix=prefix)


# graphs


def with_controlnet(w: Workflow, style: bool = False, small: bool = False) -> None:
    """The paper's way; small: half the steps' work, and smaller files."""
    flux = flux_models(w, fill=False, small=small)
    w.group("2. Reference")
    picture, mask = picture_of(w, flux, "Picture of the style" if style else "Subject", 3)
    diptych = prepare(w, picture, None if style else mask, "style" if style else "subject", small)
    w.group("3. Prompt")
    if style:
        text = prompt(w, "style", "a painting of a harbour", "a lighthouse on a cliff")
    else:
        text = prompt(w, "subject", "a plush owl", "a plush owl on the moon, stars above")
    positive = w.add("CLIPTextEncode", "Prompt", text=text, clip=flux.clip)
    guided = w.add("FluxGuidance", conditioning=positive[0], guidance=PAPER_GUIDANCE)
    negative = w.add("CLIPTextEncode", "Negative prompt", text="", clip=flux.clip)
    w.group("4. Diptych")
    controlled = w.add(
        "ControlNetInpaintingAliMamaApply",
        positive=guided[0],
        negative=negative[0],
        control_net=flux.control,
        vae=flux.vae,
        image=diptych[0],
        mask=diptych[1],
        strength=PAPER_CONTROL,
        start_percent=0.0,
        end_percent=1.0,
    )
    sizes = {"width": diptych[3], "height": diptych[4]}
    shifted = w.add("ModelSamplingFlux", model=flux.model, max_shift=1.15, base_shift=0.5, **sizes)
    model = looking(w, shifted[0], diptych[2], 1.0 if style else STRENGTH, 1)
    empty = w.add("EmptySD3LatentImage", "Size", 1, **sizes, batch_size=1)
    links = {"positive": controlled[0], "negative": controlled[1], "latent_image": empty[0]}
    latent = drawn(w, 2, 1.0 if small else PAPER_CFG, model=model, **links)
    taken_apart(w, flux, latent, diptych[2], "diptych_style" if style else "diptych", False)


def with_fill(w: Workflow, edit: bool = False) -> None:
    """Flux Fill: the noise mask keeps the left panel as it is."""
    flux = flux_models(w, fill=True)
    w.group("2. Pictures" if edit else "2. Reference")
    picture, mask = picture_of(w, flux, "Subject", 3)
    more: dict[str, Any] = {}
    if edit:
        target, painted = edited_picture(w, flux)
        more = {"target": target, "edit_mask": painted}
    diptych = prepare(w, picture, mask, "edit" if edit else "subject", False, **more)
    w.group("3. Prompt")
    subject = "a plush owl" if w.full else "a critter"
    scene = " on a park bench" if w.full else (" on a beach" if edit else " in a forest")
    text = prompt(w, "edit" if edit else "subject", subject, subject + scene)
    positive = w.add("CLIPTextEncode", "Prompt", text=text, clip=flux.clip)
    guided = w.add("FluxGuidance", conditioning=positive[0], guidance=FILL_GUIDANCE)
    nothing = w.add("ConditioningZeroOut", "No negative prompt", conditioning=positive[0])
    w.group("4. Diptych")
    masked = w.add(
        "InpaintModelConditioning",
        positive=guided[0],
        negative=nothing[0],
        vae=flux.vae,
        pixels=diptych[0],
        mask=diptych[1],
        noise_mask=True,
    )
    model = looking(w, flux.model, diptych[2], WITH_FILL if w.full else STRENGTH)
    links = {"positive": masked[0], "negative": masked[1], "latent_image": masked[2]}
    latent = drawn(w, 1, 1.0, model=model, **links)
    taken_apart(w, flux, latent, diptych[2], "diptych_edit" if edit else "diptych_fill", edit)


# what ships

LOAD = "Load a picture of a subject; a transparent PNG is cut out, others first need *Cut Out Subject*."
NAMES = "In *Diptych Prompt*, say what it is and what the new picture shows; press **Run**."
DIAL = "How closely it is kept: the **strength** of *Diptych Attention*; 1 is off, 1.3 the paper's."
SAMPLES = "Another critter: change **batch_index** of *Subject*; 1, 2 and 3 stand on white."
WIRING = """Only the wiring of this graph was checked: Flux was not run. The thumbnail shows what Flux is
given. **Less memory**: weight_dtype fp8_e4m3fn in the loader and t5xxl_fp8; for GGUF files, put *Unet Loader
(GGUF)* and *DualCLIPLoader (GGUF)* of the pack ComfyUI-GGUF in their loaders' places. At cfg 1 a step takes
half the work; a narrower reference_width saves more. Nunchaku's models bring an attention of their own, which
the dial cannot reach."""

shipped = partial(Shipped, files="flux", wiring=WIRING, twin_weights=TWIN)
SHIPPED = (
    shipped("11_diptych_subject", with_controlnet, None, (LOAD, NAMES, DIAL)),
    shipped(
        "11_diptych_subject_low_memory",
        partial(with_controlnet, small=True),
        None,
        (LOAD, NAMES, "Against *11_diptych_subject*: 8-bit weights, cfg 1, and a left panel of 512 pixels."),
    ),
    shipped(
        "12_diptych_fill",
        with_fill,
        ("Press **Run**: the critter on the left, once more in a forest.", SAMPLES, DIAL),
        (LOAD, NAMES, "Fill keeps the left panel as it is; **strength** 1 to 1.3 of *Diptych Attention*."),
    ),
    shipped(
        "13_diptych_style",
        partial(with_controlnet, style=True),
        None,
        (
            "Load a picture of the style, and in **subject** of *Diptych Prompt* say what it shows.",
            "In **target**, say what the new picture is to show; press **Run**.",
            "Styles are kept at **strength** 1 of *Diptych Attention*; a little more keeps them closer.",
        ),
    ),
    shipped(
        "14_diptych_edit",
        partial(with_fill, edit=True),
        ("Press **Run**: the critter on the left takes the other one's place.", SAMPLES, DIAL),
        (
            LOAD + " Paint a mask on the picture to edit.",
            "In *Diptych Prompt*, **target** describes the edited picture; press **Run**.",
            "Pixels outside the mask stay as they are; **feather** of *Diptych Crop* is how it fades in.",
        ),
    ),
)
