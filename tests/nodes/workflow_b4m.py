"""The graph with B4M: one entity over both dials, off and on, as a grid of four pictures."""

from __future__ import annotations

from workflow_graphs import CHECKPOINT, ENTITY, NEGATIVE, Link, Shipped, Workflow, empty

STRENGTHS = (0.0, 1.0)
NO_STYLE = "(none: content_file is one entity)"


def content_and_style(w: Workflow) -> None:
    w.group("1. Models")
    kind, options = (
        ("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT}) if w.full else ("PiTMiniatureSDXL", {})
    )
    loaded = w.add(kind, "SDXL" if w.full else "", **options)
    model, clip, vae = loaded[0], loaded[1], loaded[2]
    entity = ENTITY if w.full else "miniature: b4m join 1 1"
    b4m = w.add("PiTLoadB4M", content_file=entity, style_file=NO_STYLE)[0]
    w.group("2. Prompt")
    text = (
        "an image of snq teddybear in w@z yarn art style"
        if w.full
        else "a snq critter, in a night, w@z style"
    )
    conditions = {
        "positive": w.add("CLIPTextEncode", "Prompt", text=text, clip=clip)[0],
        "negative": w.add("CLIPTextEncode", "Negative prompt", text=NEGATIVE, clip=clip)[0],
        "latent_image": empty(w, 0),
    }
    w.group("3. Content and style")
    rows = [
        [
            _drawn(w, 2 * i + j, model, b4m, (content, style), vae, conditions)
            for j, style in enumerate(STRENGTHS)
        ]
        for i, content in enumerate(STRENGTHS)
    ]
    w.group("4. Grid")
    top, bottom = (_beside(w, "Row", *row, "right") for row in rows)
    grid = _beside(w, "Content downwards, style to the right", top, bottom, "down")
    w.add("SaveImage", column=1, images=grid, filename_prefix="content_and_style")


def _drawn(
    w: Workflow,
    column: int,
    model: Link,
    b4m: Link,
    dials: tuple[float, float],
    vae: Link,
    conditions: dict[str, Link],
) -> Link:
    content, style = dials
    applied = w.add(
        "PiTApplyB4M",
        f"Content {content:g}, style {style:g}",
        column,
        model=model,
        b4m=b4m,
        content=content,
        style=style,
        base=1.0,
        swap_roles=False,
        mode="auto",
        blocks="all blocks",
        block_weights="",
    )
    steps, cfg = (50, 5.0) if w.full else (25, 3.0)
    settings = {"seed": 7, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "normal"}
    sampled = w.add("KSampler", column=column, model=applied[0], **conditions, **settings, denoise=1.0)
    return w.add("VAEDecode", column=column, samples=sampled[0], vae=vae)[0]


def _beside(w: Workflow, title: str, first: Link, second: Link, direction: str) -> Link:
    return w.add(
        "ImageStitch",
        title,
        image1=first,
        image2=second,
        direction=direction,
        match_image_size=True,
        spacing_width=8,
        spacing_color="white",
    )[0]


DIALS = "Other strengths: **content** and **style** of each *Apply B4M*; no file is read again for them."

SHIPPED = (
    Shipped(
        "10_content_and_style",
        content_and_style,
        (
            "Press **Run**: a critter, a surface style, both and neither, from the same noise.",
            DIALS,
            "Its two parents, spliced: choose *content 1* and *style 1* in *Load B4M*.",
        ),
        (
            "Press **Run**: the teddy bear, the yarn, both and neither, from the same noise.",
            DIALS,
            "Your own: a content and a style file in *Load B4M*, and both of their words in *Prompt*.",
        ),
        weights="b4m_join_1_1.safetensors",
    ),
)
