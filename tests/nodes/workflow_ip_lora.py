"""The graphs with an IP-LoRA: a creature in a scene that the text names, and its character sheet."""

from __future__ import annotations

from workflow_graphs import (
    CHARACTER_SHEET,
    IN_A_SCENE,
    Models,
    Shipped,
    Workflow,
    apply,
    choose,
    empty,
    encode,
    models,
)

from pit_core.train.ip_lora_prompts import SHEET, creature_in_scene


def scene_from_text(w: Workflow) -> None:
    text = creature_in_scene("a photo, a creature in a forest") if w.full else "a critter, in a forest"
    _drawn(w, IN_A_SCENE if w.full else "miniature: scene", text, "scene")


def character_sheet(w: Workflow) -> None:
    # The miniature reads 38 words and was trained on those; more would make ComfyUI add a second text.
    text = SHEET if w.full else SHEET.removesuffix(" of the object")
    _drawn(w, CHARACTER_SHEET if w.full else "miniature: sheet", text, "character_sheet")


def _drawn(w: Workflow, file: str, text: str, prefix: str) -> None:
    """One picture's tokens at full weight, under the IP-LoRA and a text, as the files were trained."""
    m = models(w, prior=False)
    w.group("2. Creature")
    (picture,) = choose(w, m.pictures, {"Creature, on white": 3})
    tokens = encode(w, m, picture, "Creature")
    w.group("3. IP-LoRA")
    strengths = ("strength", "input_blocks", "middle_block", "output_blocks", "adapter_layers")
    lora = w.add(
        "PiTIPLoRA", model=m.model, file=file, ip_adapter=m.ip_adapter, **dict.fromkeys(strengths, 1.0)
    )
    model = apply(w, m, lora[0], tokens, uncond="same as positive")
    w.group("4. Picture")
    w.add("SaveImage", column=2, images=_sampled(w, m, model, text), filename_prefix=prefix)


def _sampled(w: Workflow, m: Models, model: list, text: str) -> list:
    positive = w.add("CLIPTextEncode", "Text", text=text, clip=m.clip)
    nothing = w.add("ConditioningZeroOut", "No negative prompt", conditioning=positive[0])
    latent = empty(w, 1)
    steps, cfg = (50, 5.0) if w.full else (25, 3.0)
    sampled = w.add(
        "KSampler",
        column=1,
        model=model,
        positive=positive[0],
        negative=nothing[0],
        latent_image=latent,
        seed=7,
        steps=steps,
        cfg=cfg,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    return w.add("VAEDecode", column=1, samples=sampled[0], vae=m.vae)[0]


STRENGTH = "How loud the text is: the **strength** of *Apply IP-LoRA*; 0 is the adapter alone."
SAMPLES = "Another creature: change **batch_index**; 2 and 3 stand on white, as the IP-LoRA saw them."
LOAD = "Load a creature on white paper, and press **Run**; other backgrounds: *Remove Background* first."

SHIPPED = (
    Shipped(
        "08_scene_from_text",
        scene_from_text,
        (
            "Press **Run**: a creature, at full image weight, in the scene that *Text* names.",
            "Other scenes: in a beach, in a snowfield, in a night, in a desert, in a meadow. " + SAMPLES,
            STRENGTH,
        ),
        (LOAD, "Other scenes: in *Text*, change what stands after *in*.", STRENGTH),
        weights="ip_lora_scene.safetensors",
    ),
    Shipped(
        "09_character_sheet",
        character_sheet,
        ("Press **Run**: a creature becomes its character sheet.", SAMPLES, STRENGTH),
        (LOAD, "The *Text* is the sentence that the IP-LoRA was trained with; leave it as it is.", STRENGTH),
        weights="ip_lora_sheet.safetensors",
    ),
)
