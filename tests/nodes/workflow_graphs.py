"""The shipped workflows as graphs. workflow_write.py makes the files in workflows/ of them.

Each is described once, for two kinds of files: the miniature's, and full-size ones in the released layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).resolve().parents[2] / "pit_core" / "miniature" / "weights"
MINIATURE = "miniature (ships with this pack)"
CHECKPOINT = "sd_xl_base_1.0.safetensors"
ENCODER = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
ADAPTER = "ip-adapter-plus_sdxl_vit-h.safetensors"
PRIOR = "prior.ckpt"
FLUX, FLUX_VAE = "flux1-dev.safetensors", "ae.safetensors"
CLIP_L, T5 = "clip_l.safetensors", "t5xxl_fp16.safetensors"
FILL, T5_SMALL = "flux1-fill-dev.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors"
CONTROLNET = "flux1-dev-inpainting-alimama-beta.safetensors"
IN_A_SCENE, CHARACTER_SHEET = "pit_background_generation.safetensors", "pit_character_sheet.safetensors"
ENTITY = "teddybear_yarn.safetensors"
EXAMPLE = "example.png"  # comes with ComfyUI, so the drop-down always has it

HUB = "https://huggingface.co"
RELEASED = f"{HUB}/kfirgold99/Piece-it-Together/resolve/main"
PRIORS = f"{RELEASED}/models/characters_ckpt"
TEXT_ENCODERS = f"{HUB}/comfyanonymous/flux_text_encoders/resolve/main"


@dataclass(frozen=True)
class File:
    """A model file: its folder below ComfyUI's models/, where it comes from, and a remark."""

    folder: str
    url: str
    remark: str = ""


FILES = {
    CHECKPOINT: File(
        "checkpoints", f"{HUB}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{CHECKPOINT}"
    ),
    ENCODER: File(
        "clip_vision",
        f"{HUB}/h94/IP-Adapter/resolve/main/models/image_encoder/model.safetensors",
        "which comes as model.safetensors: rename it",
    ),
    ADAPTER: File("ipadapter", f"{HUB}/h94/IP-Adapter/resolve/main/sdxl_models/{ADAPTER}"),
    PRIOR: File("ip_prior", f"{PRIORS}/{PRIOR}", f"and beside it [cfg.yaml]({PRIORS}/cfg.yaml)"),
    FLUX: File(
        "diffusion_models",
        f"{HUB}/Comfy-Org/flux1-dev/resolve/main/{FLUX}",
        "mind its non-commercial licence",
    ),
    FILL: File(
        "diffusion_models",
        f"{HUB}/black-forest-labs/FLUX.1-Fill-dev/resolve/main/{FILL}",
        "mind its non-commercial licence, which has to be accepted there",
    ),
    CONTROLNET: File(
        "controlnet",
        f"{HUB}/alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta/resolve/main/"
        "diffusion_pytorch_model.safetensors",
        "which comes as diffusion_pytorch_model.safetensors: rename it",
    ),
    T5_SMALL: File("text_encoders", f"{TEXT_ENCODERS}/{T5_SMALL}"),
    CLIP_L: File("text_encoders", f"{TEXT_ENCODERS}/{CLIP_L}"),
    T5: File("text_encoders", f"{TEXT_ENCODERS}/{T5}"),
    FLUX_VAE: File(
        "vae", f"{HUB}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/{FLUX_VAE}"
    ),
    **{
        name: File(
            "loras",
            f"{RELEASED}/{name[4:].removesuffix('.safetensors')}/pytorch_lora_weights.safetensors",
            "which comes as pytorch_lora_weights.safetensors: rename it",
        )
        for name in (IN_A_SCENE, CHARACTER_SHEET)
    },
    ENTITY: File(
        "loras",
        "https://drive.google.com/drive/folders/1xlJyheBInkt26zDdlgh8mwrOMxtZkjvK",
        "the file of the folder teddybear_yarn there, pytorch_lora_weights.safetensors: rename it",
    ),
}

QUALITY = "best quality, high quality"
NEGATIVE = "monochrome, lowres, bad anatomy, worst quality, low quality"

Link = list[Any]
"""[node id, number of its output], as the API has it."""


@dataclass
class Node:
    """One node; `inputs` as the API takes them, `column` is where it stands in its group."""

    id: int
    kind: str
    title: str
    column: int
    inputs: dict[str, Any]

    def __getitem__(self, output: int) -> Link:
        return [str(self.id), output]

    def files(self) -> list[str]:
        """The model files that it names."""
        return [value for value in self.inputs.values() if isinstance(value, str) and value in FILES]


@dataclass
class Workflow:
    """A graph in groups, what its note says (Markdown), and whether it is drawn for full-size files.

    wiring: what the note on files says of what was run, where it is not the usual.
    """

    name: str
    note: str
    full: bool
    wiring: str = ""
    groups: dict[str, list[Node]] = field(default_factory=dict)

    @property
    def nodes(self) -> list[Node]:
        return [node for nodes in self.groups.values() for node in nodes]

    def group(self, title: str) -> None:
        """Start a group; nodes go into the newest."""
        self.groups[title] = []

    def add(self, kind: str, title: str = "", column: int = 0, **inputs: Any) -> Node:
        node = Node(len(self.nodes) + 1, kind, title, column, inputs)
        list(self.groups.values())[-1].append(node)
        return node

    def files(self) -> list[str]:
        """The model files that it names."""
        return [name for node in self.nodes for name in node.files()]

    def api(self) -> dict[str, Any]:
        """What POST /prompt takes."""
        return {str(n.id): {"class_type": n.kind, "inputs": dict(n.inputs)} for n in self.nodes}


@dataclass(frozen=True)
class Models:
    """Links to what a graph draws with; pictures, of the miniature, are its samples."""

    model: Link
    clip: Link
    vae: Link
    clip_vision: Link
    ip_adapter: Link
    prior: Link | None
    parts: Link | None = None
    pictures: Link | None = None


# pieces


def models(w: Workflow, prior: bool = True) -> Models:
    w.group("1. Models")
    if w.full:
        checkpoint = w.add("CheckpointLoaderSimple", "SDXL", ckpt_name=CHECKPOINT)
        vision = w.add("CLIPVisionLoader", "Image encoder (ViT-H)", clip_name=ENCODER)
        bundle = (checkpoint[0], checkpoint[1], checkpoint[2], vision[0])
        samples: tuple[Link | None, Link | None] = (None, None)
    else:
        miniature = w.add("PiTMiniatureSDXL")
        bundle = (miniature[0], miniature[1], miniature[2], miniature[3])
        samples = (miniature[4], miniature[5])
    adapter = w.add("PiTLoadIPAdapter", file=ADAPTER if w.full else MINIATURE)
    loaded = w.add("PiTLoadPrior", file=PRIOR if w.full else MINIATURE)[0] if prior else None
    return Models(*bundle, adapter[0], loaded, *samples)


def choose(w: Workflow, samples: Link | None, chosen: dict[str, int]) -> list[Link]:
    """Pictures by title: the user's own, or those of the miniature's samples that are numbered."""
    if samples is None:
        return [w.add("LoadImage", title, image=EXAMPLE)[0] for title in chosen]
    picks = [
        w.add("ImageFromBatch", title, image=samples, batch_index=number, length=1)[0]
        for title, number in chosen.items()
    ]
    w.add("PreviewImage", "The samples, numbered from 0", images=samples)
    return picks


def concepts(w: Workflow, m: Models, count: int) -> Link:
    """Parts to tokens of whole concepts."""
    w.group("2. Parts")
    chosen = {"Part 1": 8, "Part 2": 2, "Part 3": 6} if w.full else {"Wings": 8, "Ears": 2, "Tail": 6}
    parts = choose(w, m.parts, chosen)
    w.group("3. Concept" if count == 1 else "3. Concepts")
    encoded = w.add(
        "PiTEncodeParts",
        ip_adapter=m.ip_adapter,
        clip_vision=m.clip_vision,
        **{f"parts.part{i}": part for i, part in enumerate(parts)},
        as_sketch=False,
    )
    sampled = w.add(
        "PiTSamplePrior",
        prior=m.prior,
        parts=encoded[0],
        count=count,
        steps=25,
        guidance=2.0,
        solver="euler",
        seed=7,
        strength=1.0,
    )
    return sampled[0]


def apply(w: Workflow, m: Models, model: Link, tokens: Link, title: str = "", **changes: Any) -> Link:
    settings = {
        "weight": 1.0,
        "start_at": 0.0,
        "end_at": 1.0,
        "schedule": "even",
        "layer_map": "",
        "composition_weight": 1.0,
        "embeds_scaling": "V only",
        "uncond": "null or negative",
        "rows": "pictures",
    }
    links = {"model": model, "ip_adapter": m.ip_adapter, "tokens": tokens}
    return w.add("PiTApplyTokens", title, **links, **{**settings, **changes})[0]


def encode(w: Workflow, m: Models, picture: Link, title: str) -> Link:
    links = {"ip_adapter": m.ip_adapter, "clip_vision": m.clip_vision, "image": picture}
    return w.add("PiTEncodeImage", title, **links, fit="crop", null="as trained", chunk=8)[0]


def sample(
    w: Workflow,
    m: Models,
    model: Link,
    prompt: str = QUALITY,
    count: int = 1,
    column: int = 1,
    title: str = "Prompt",
    seed: int = 7,
    latent: Link | None = None,
) -> Link:
    """Sample `latent`, or `count` empty ones, and decode, both in `column`; the pictures."""
    steps, cfg = (50, 5.0) if w.full else (25, 3.0)
    positive = w.add("CLIPTextEncode", title, column - 1, text=prompt, clip=m.clip)
    negative = w.add("CLIPTextEncode", "Negative prompt", column - 1, text=NEGATIVE, clip=m.clip)
    latent = latent or empty(w, column, count)
    sampled = w.add(
        "KSampler",
        column=column,
        model=model,
        positive=positive[0],
        negative=negative[0],
        latent_image=latent,
        seed=seed,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return w.add("VAEDecode", column=column, samples=sampled[0], vae=m.vae)[0]


def empty(w: Workflow, column: int, count: int = 1) -> Link:
    side = 1024 if w.full else 128
    return w.add("EmptyLatentImage", "Size", column, width=side, height=side, batch_size=count)[0]


def draw(
    w: Workflow, m: Models, model: Link, prefix: str, prompt: str = QUALITY, count: int = 1, column: int = 1
) -> Link:
    """Sample, decode and save, in `column`; the pictures."""
    pictures = sample(w, m, model, prompt, count, column)
    w.add("SaveImage", column=column, images=pictures, filename_prefix=prefix)
    return pictures


# workflows


def first_concept(w: Workflow) -> None:
    m = models(w)
    tokens = concepts(w, m, 1)
    w.group("4. Picture")
    draw(w, m, apply(w, m, m.model, tokens), "concept")


def parts_and_prompt(w: Workflow) -> None:
    m = models(w)
    tokens = concepts(w, m, 1)
    w.group("4. Picture")
    prompt = "a fantasy creature in a forest, best quality" if w.full else "a critter, in a forest"
    draw(w, m, apply(w, m, m.model, tokens, weight=0.6), "concept_with_prompt", prompt)


def style_and_composition(w: Workflow) -> None:
    m = models(w, prior=False)
    w.group("2. Two pictures")
    style, composition = choose(w, m.pictures, {"Style from": 0, "Composition from": 2})
    w.group("3. Tokens")
    look, layout = encode(w, m, style, "Style"), encode(w, m, composition, "Composition")
    w.group("4. Picture")
    # Which layers carry what is a matter of the model: in the miniature, layer 7 carries the shapes alone.
    shapes = {"schedule": "layer map", "layer_map": "7:1"}
    rest = {"schedule": "layer map", "layer_map": ", ".join(f"{t}:1" for t in range(11) if t != 7)}
    model = apply(w, m, m.model, look, "Apply as style", **({"schedule": "style"} if w.full else rest))
    model = apply(
        w, m, model, layout, "Apply as composition", **({"schedule": "composition"} if w.full else shapes)
    )
    draw(w, m, model, "style_and_composition", column=2)


def regions(w: Workflow) -> None:
    m = models(w, prior=False)
    w.group("2. Two pictures, as tokens")
    pictures = choose(w, m.pictures, {"Left half": 2, "Right half": 3})
    left, right = (encode(w, m, p, t) for p, t in zip(pictures, ("Left", "Right"), strict=True))
    w.group("3. Two masks")
    side = 1024 if w.full else 128
    black = w.add("SolidMask", "The picture, black", value=0.0, width=side, height=side)
    white = w.add("SolidMask", "Its left half, white", value=1.0, width=side // 2, height=side)
    mask = w.add(
        "MaskComposite", "Left mask", destination=black[0], source=white[0], x=0, y=0, operation="add"
    )
    other = w.add("InvertMask", "Right mask", mask=mask[0])
    w.group("4. Picture")
    model = apply(w, m, m.model, left, "Apply on the left", mask=mask[0])
    model = apply(w, m, model, right, "Apply on the right", mask=other[0])
    draw(w, m, model, "regions", column=2)


def batch_of_concepts(w: Workflow) -> None:
    count = 4 if w.full else 9
    m = models(w)
    tokens = concepts(w, m, count)
    w.add("PiTSaveTokens", tokens=tokens, filename_prefix="concepts")
    w.group("4. Pictures")
    draw(w, m, apply(w, m, m.model, tokens), "concepts/concept", count=count)


def refined_by_flux(w: Workflow) -> None:
    m = models(w)
    tokens = concepts(w, m, 1)
    w.group("4. Picture")
    picture = draw(w, m, apply(w, m, m.model, tokens), "character")
    w.group("5. Flux models")
    flux = w.add("UNETLoader", "Flux", unet_name=FLUX, weight_dtype="default")
    clip = w.add(
        "DualCLIPLoader",
        "Flux text encoders",
        clip_name1=CLIP_L,
        clip_name2=T5,
        type="flux",
        device="default",
    )
    vae = w.add("VAELoader", "Flux VAE", vae_name=FLUX_VAE)
    w.group("6. Refined picture")
    text = w.add("CLIPTextEncode", "What it is", text="a fantasy character, highly detailed", clip=clip[0])
    guided = w.add("FluxGuidance", conditioning=text[0], guidance=3.5)
    nothing = w.add("ConditioningZeroOut", conditioning=text[0])
    latent = w.add("VAEEncode", pixels=picture, vae=vae[0])
    refined = w.add(
        "KSampler",
        "Refine: denoise 0.35",
        column=1,
        model=flux[0],
        positive=guided[0],
        negative=nothing[0],
        latent_image=latent[0],
        seed=7,
        steps=20,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=0.35,
    )
    decoded = w.add("VAEDecode", column=1, samples=refined[0], vae=vae[0])
    w.add("SaveImage", column=2, images=decoded[0], filename_prefix="character_refined")


def slider(w: Workflow) -> None:
    m = models(w)
    tokens = concepts(w, m, 1)
    w.group("4. Two piles of pictures")
    what = "{} fantasy creature, full body, white background" if w.full else "a {} critter"
    count = 8 if w.full else 16
    thin, wide = (
        sample(w, m, m.model, what.format(word), count, 1, f"Pile of {word} ones", seed)
        for seed, word in enumerate(("thin", "wide"))
    )
    w.group("5. Direction")
    direction = w.add(
        "PiTFindDirection",
        method="auto",
        space="IP tokens",
        first_name="thin",
        second_name="wide",
        first_images=thin,
        second_images=wide,
        ip_adapter=m.ip_adapter,
        clip_vision=m.clip_vision,
    )
    w.add("PiTSaveDirection", direction=direction[0], filename_prefix="thin_to_wide")
    w.group("6. Slider")
    swept = w.add(
        "PiTSweepDirection",
        tokens=tokens,
        direction=direction[0],
        latent=empty(w, 0),
        steps="-1, -0.5, 0, 0.5, 1",
        token_mask="",
    )
    pictures = sample(w, m, apply(w, m, m.model, swept[0]), latent=swept[1])
    grid = w.add("PiTSweepGrid", column=2, images=pictures, labels=swept[2])
    grid.inputs["title"] = "thin to wide"  # the node's own input, not the name of its box
    w.add("SaveImage", column=2, images=grid[0], filename_prefix="thin_to_wide")


# what ships: what to do, in three lines


@dataclass(frozen=True)
class Shipped:
    """A workflow: the lines of its note for the miniature (None: no such twin) and for full-size files.

    weights: a file of the miniature's without which neither is shipped; twin_weights: without which its twin
    is not. files: the family of the full-size files. wiring: what its note says of what was run.
    """

    name: str
    build: Callable[[Workflow], None]
    miniature: tuple[str, str, str] | None
    full: tuple[str, str, str]
    weights: str | None = None
    twin_weights: str | None = None
    files: str = "sdxl"
    wiring: str = ""


OTHER_PARTS = "Other parts: change **batch_index**; the preview shows the samples, numbered from 0."
ANOTHER = "Another one out of the same parts: change the seed of *Sample IP-Prior*."
LOAD_PARTS = "Load a picture of a part into each *Part* node; plain or transparent backgrounds are best."
WEIGHT = "The lower the **weight** of *Apply IP Tokens*, the more the prompt counts."

SHIPPED = (
    Shipped(
        "01_first_concept",
        first_concept,
        ("Press **Run**: three sample parts become a whole creature.", OTHER_PARTS, ANOTHER),
        (LOAD_PARTS, "Press **Run**: they become a whole creature.", ANOTHER),
    ),
    Shipped(
        "02_parts_and_prompt",
        parts_and_prompt,
        (
            "Press **Run**: three sample parts, and the scene that the prompt names.",
            "Other scenes: in a beach, in a snowfield, in a night, in a desert, in a meadow.",
            WEIGHT,
        ),
        (LOAD_PARTS, "Write the prompt, and press **Run**.", WEIGHT),
    ),
    Shipped(
        "03_style_and_composition",
        style_and_composition,
        (
            "Press **Run**: the shapes of one picture, the colours and the scene of another.",
            "Other pictures: change **batch_index**; the preview shows the samples, numbered from 0.",
            "Here layer 7 carries the shapes; SDXL has the schedules *style* and *composition*.",
        ),
        (
            "Load one picture for the style and one for the composition.",
            "Press **Run**. A prompt that says what is to be seen helps.",
            "How much each counts is the **weight** of its *Apply* node.",
        ),
    ),
    Shipped(
        "04_regions",
        regions,
        (
            "Press **Run**: each half of the picture follows its own sample.",
            "Other regions: change the size of the white mask, or **x** and **y** of *Left mask*.",
            "Where masks overlap, both count.",
        ),
        (
            "Load one picture for each half, and press **Run**.",
            "Other regions: change the white mask, or connect *Load Image (as Mask)* instead.",
            "Where masks overlap, both count.",
        ),
    ),
    Shipped(
        "05_batch_of_concepts",
        batch_of_concepts,
        (
            "Press **Run**: nine creatures out of the same three parts.",
            "For more, raise **count** of *Sample IP-Prior* and **batch_size** of *Size* alike.",
            "Their tokens are saved, too: *Load IP Tokens* brings them back.",
        ),
        (
            LOAD_PARTS + " Press **Run**.",
            "For more, raise **count** of *Sample IP-Prior* and **batch_size** of *Size* alike.",
            "Their tokens are saved, too: *Load IP Tokens* brings them back.",
        ),
    ),
    Shipped(
        "06_refined_by_flux",
        refined_by_flux,
        None,
        (
            LOAD_PARTS,
            "Say in a few words what it is, and press **Run**: SDXL draws it, then Flux redraws it.",
            "The lower **denoise** is, the more is kept; 0.35 is the paper's last step.",
        ),
    ),
    Shipped(
        "07_slider",
        slider,
        (
            "Press **Run**: what wide critters have over thin ones, found in two piles, moves a concept.",
            "Another slider: change both prompts of *Two piles*, such as flat style and sketch style.",
            "How far: the **steps** of *Sweep Direction*. The saved direction loads with *Load Direction*.",
        ),
        (
            LOAD_PARTS + " Press **Run**.",
            "Another slider: change both prompts of *Two piles*, or connect piles of your own pictures.",
            "How far: the **steps** of *Sweep Direction*. The saved direction loads with *Load Direction*.",
        ),
    ),
)

WIRING = """The same graph runs to the end with the miniature's files; with these files its wiring was
checked, but they were not run. The thumbnail is the miniature's."""
FLUX_WIRING = """Only the wiring of this graph was checked: neither Flux nor these SDXL files were run. The
thumbnail is a concept of the miniature, before the last step."""


def all_workflows() -> list[Workflow]:
    """Everything that ships, by name."""
    from workflow_b4m import SHIPPED as WITH_B4M  # made of the pieces above
    from workflow_diptych import SHIPPED as WITH_DIPTYCH
    from workflow_ip_lora import SHIPPED as WITH_IP_LORA

    made = []
    for each in (*SHIPPED, *WITH_IP_LORA, *WITH_B4M, *WITH_DIPTYCH):
        if not _is_there(each.weights):
            continue
        if each.miniature and _is_there(each.twin_weights):
            made.append(_built(each, each.miniature, full=False))
        made.append(_built(each, each.full, full=True))
    return made


def _is_there(weights: str | None) -> bool:
    return weights is None or (WEIGHTS / weights).is_file()


def _built(shipped: Shipped, lines: tuple[str, str, str], full: bool) -> Workflow:
    note = "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
    w = Workflow(f"{shipped.name}_{shipped.files if full else 'miniature'}", note, full, shipped.wiring)
    shipped.build(w)
    return w


def files_note(w: Workflow) -> str:
    """Which file goes where, and what was run; empty for the miniature, which needs none."""
    files = [(name, FILES[name]) for name in w.files()]
    if not files:
        return ""
    rows = [
        f"- **models/{file.folder}**: [{name}]({file.url}){', ' + file.remark if file.remark else ''}"
        for name, file in files
    ]
    said = " ".join((w.wiring or (FLUX_WIRING if FLUX in w.files() else WIRING)).split())
    return "\n".join([*rows, "", said])
