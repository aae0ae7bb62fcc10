"""Semantic directions in ComfyUI: found between two piles, kept as files, used as sliders on tokens."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..pit_core.directions.checkpoint import load_direction, save_direction
from ..pit_core.directions.direction import Direction, describe, fit_notes, notes
from ..pit_core.directions.edit import Source, edit, picture_features, sweep
from ..pit_core.directions.find import CHOICES, find_direction
from ..pit_core.directions.grid import sweep_grid
from ..pit_core.directions.picture import direction_picture, similarities
from ..pit_core.directions.text import parse_mask, parse_steps, step_labels
from ..pit_core.errors import PitError
from ..pit_core.ip_adapter.encode import tokens_from_features
from ..pit_core.ip_adapter.pixels import preprocess
from ..pit_core.ip_adapter.tokens import IPTokens
from ..pit_core.miniature.assets import DIRECTIONS
from . import host
from .encoding import Encoding
from .images import to_image, to_pictures
from .miniature import shipped_names, shipped_or_own, state_of_either
from .sockets import DirectionSocket, IPAdapterSocket, IPTokensSocket, naming, schema
from .token_tools import checked

SPACES = {"IP tokens": "tokens", "CLIP features": "clip"}
CLIP = "For directions in CLIP features"
MAX_INPUTS = 8
CHUNK = 8  # pictures whose features are read at a time
FURTHEST = 3.0  # steps


class PiTFindDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        first, second = "The pile that the direction leads away from", "The pile that step 1 leads to"
        return schema(
            "PiTFindDirection",
            "Find Direction",
            "Finds what one pile of pictures has over another, such as wide creatures over thin ones, as a "
            "direction to move any tokens along.",
            ["semantic slider", "concept slider", "difference of means"],
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(CHOICES),
                    default="auto",
                    tooltip="mean: the difference of the means, as published. ridge: damps what few pictures "
                    "have in common by chance. auto: whichever held-out pictures confirm more.",
                ),
                io.Combo.Input(
                    "space",
                    options=list(SPACES),
                    default="IP tokens",
                    tooltip="IP tokens also fit what a prior makes. CLIP features are changed before the "
                    "adapter, so that edits need the picture; they need images here, too.",
                ),
                io.String.Input("first_name", default="", tooltip="What the first pile shows, such as thin."),
                io.String.Input("second_name", default="", tooltip="What the second shows, such as wide."),
                io.Image.Input("first_images", optional=True, tooltip=f"{first}: 8 pictures or more."),
                io.Image.Input("second_images", optional=True, tooltip=f"{second}: 8 pictures or more."),
                IPTokensSocket.Input("first_tokens", optional=True, tooltip=f"{first}, as tokens."),
                IPTokensSocket.Input("second_tokens", optional=True, tooltip=f"{second}, as tokens."),
                *_encoders("Images need the adapter", "Images need the image encoder"),
            ],
            outputs=[
                DirectionSocket.Output(
                    display_name="direction", tooltip="For 'Edit IP Tokens', 'Sweep Direction' and to save."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="How many pictures, how many held-out ones it tells apart, how long a step is.",
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def execute(
        cls,
        method: str = "auto",
        space: str = "IP tokens",
        first_name: str = "",
        second_name: str = "",
        first_images: Tensor | None = None,
        second_images: Tensor | None = None,
        first_tokens: IPTokens | None = None,
        second_tokens: IPTokens | None = None,
        ip_adapter: host.ManagedAdapter | None = None,
        clip_vision: Any = None,
    ) -> io.NodeOutput:
        given = {"first": (first_images, first_tokens), "second": (second_images, second_tokens)}
        encoding = None
        if any(images is not None for images, _ in given.values()):
            encoding = _encoding(ip_adapter, clip_vision, "Images")
        clip = SPACES[space] == "clip"
        piles = [_pile(name, *each, encoding, clip) for name, each in given.items()]
        found = find_direction(
            *piles,
            space=SPACES[space],
            method=method,
            names=(first_name, second_name),
            adapter=_common_adapter(encoding, first_tokens, second_tokens),
        )
        return _reported(found)


class PiTLoadDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTLoadDirection",
            "Load Direction",
            "Reads a direction: one that was saved or found by `pit direction`, or a released .pt file.",
            ["load slider", "semantic slider", "ip_direction.pt"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[*shipped_names(DIRECTIONS), *host.files_in(host.DIRECTIONS)],
                    tooltip="One of the miniature's, or a file in models/ip_directions or "
                    "output/ip_directions; press R for new ones.",
                )
            ],
            outputs=[
                DirectionSocket.Output(
                    display_name="direction", tooltip="For 'Edit IP Tokens' and 'Sweep Direction'."
                ),
                io.String.Output(
                    display_name="report", tooltip="What the file says: piles, how well it holds, length."
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        return state_of_either(DIRECTIONS, host.DIRECTIONS, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        with naming("file"):
            path = shipped_or_own(DIRECTIONS, host.DIRECTIONS, file)
        return _reported(load_direction(path))


class PiTSaveDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTSaveDirection",
            "Save Direction",
            "Writes a direction to output/ip_directions, where 'Load Direction' finds it.",
            ["save slider", "export direction"],
            inputs=[
                DirectionSocket.Input("direction", tooltip="The direction to keep, with all it says."),
                io.String.Input(
                    "filename_prefix",
                    default="direction",
                    tooltip="The name to which a number is added; subfolders with '/'.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, direction: Direction, filename_prefix: str = "direction") -> io.NodeOutput:
        path, name = host.new_file(host.DIRECTIONS, filename_prefix)
        save_direction(path, _direction(direction, "direction"))
        return io.NodeOutput(ui=ui.PreviewText(f"Saved {direction} as {name}"))


class PiTEditTokens(io.ComfyNode):
    """Up to four directions at once; for more, one node after the other."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTEditTokens",
            "Edit IP Tokens",
            "Moves tokens along up to four directions: of pictures, or of what a prior made of parts.",
            ["semantic slider", "concept slider", "apply direction"],
            inputs=[
                IPTokensSocket.Input("tokens", tooltip="The tokens to edit; every row moves alike."),
                DirectionSocket.Input("direction", tooltip="What to change."),
                _step("step", "How far along the direction: 1 as far as its piles are apart, -1 back."),
                _step("step2", "How far along direction2, if it is connected."),
                _step("step3", "How far along direction3, if it is connected."),
                _step("step4", "How far along direction4, if it is connected."),
                io.Boolean.Input(
                    "orthogonal",
                    default=False,
                    tooltip="Set several directions at right angles first, so that one does not undo or "
                    "double another.",
                ),
                _mask(),
                DirectionSocket.Input("direction2", optional=True, tooltip="Another change, added."),
                DirectionSocket.Input("direction3", optional=True, tooltip="Another change, added."),
                DirectionSocket.Input("direction4", optional=True, tooltip="Another change, added."),
                *_source(),
            ],
            outputs=[
                IPTokensSocket.Output(
                    display_name="tokens", tooltip="The edited tokens, as many rows as before."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        tokens: IPTokens,
        direction: Direction,
        step: float = 1.0,
        step2: float = 1.0,
        step3: float = 1.0,
        step4: float = 1.0,
        orthogonal: bool = False,
        token_mask: str = "",
        direction2: Direction | None = None,
        direction3: Direction | None = None,
        direction4: Direction | None = None,
        ip_adapter: host.ManagedAdapter | None = None,
        clip_vision: Any = None,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        tokens = checked(tokens, "tokens")
        named = {"direction": (_direction(direction, "direction"), step)}
        others = {"2": (direction2, step2), "3": (direction3, step3), "4": (direction4, step4)}
        for number, (each, far) in others.items():
            if each is not None:
                named[f"direction{number}"] = (_direction(each, f"direction{number}"), far)
        moves = list(named.values())
        found = edit(
            tokens,
            moves,
            mask=parse_mask(token_mask, tokens.unit),
            orthogonal=orthogonal,
            source=_source_of(moves, ip_adapter, clip_vision, image),
        )
        said = [note for each, _ in moves for note in fit_notes(each, tokens.adapter)]
        return io.NodeOutput(found, ui=ui.PreviewText("\n".join(said)) if said else None)


class PiTSweepDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTSweepDirection",
            "Sweep Direction",
            "Edits tokens at several steps along a direction, one picture for each, all from the same noise; "
            "'Sweep Grid' lays them out.",
            ["slider grid", "direction steps", "xy plot"],
            inputs=[
                IPTokensSocket.Input("tokens", tooltip="The tokens to edit: one row of the grid for each."),
                DirectionSocket.Input("direction", tooltip="The direction to go along."),
                io.Latent.Input(
                    "latent", tooltip="One empty latent; it is repeated for every picture, with one noise."
                ),
                io.String.Input(
                    "steps", default="-1, -0.5, 0, 0.5, 1", tooltip="The steps, one column for each."
                ),
                _mask(),
                *_source(),
            ],
            outputs=[
                IPTokensSocket.Output(
                    display_name="tokens", tooltip="Every row at every step, the first row's steps first."
                ),
                io.Latent.Output(
                    display_name="latent", tooltip="As many as there are pictures, for the KSampler."
                ),
                io.String.Output(display_name="labels", tooltip="A line for each step, for 'Sweep Grid'."),
            ],
        )

    @classmethod
    def execute(
        cls,
        tokens: IPTokens,
        direction: Direction,
        latent: dict[str, Any],
        steps: str = "-1, -0.5, 0, 0.5, 1",
        token_mask: str = "",
        ip_adapter: host.ManagedAdapter | None = None,
        clip_vision: Any = None,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        tokens, values = checked(tokens, "tokens"), parse_steps(steps)
        found = sweep(
            tokens,
            _direction(direction, "direction"),
            values,
            mask=parse_mask(token_mask, tokens.unit),
            source=_source_of([(direction, 1.0)], ip_adapter, clip_vision, image),
        )
        labels = "\n".join(step_labels(values))
        said = fit_notes(direction, tokens.adapter)
        shown = ui.PreviewText("\n".join(said)) if said else None
        return io.NodeOutput(found, _repeated(latent, tokens.rows, len(values)), labels, ui=shown)


class PiTSweepGrid(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTSweepGrid",
            "Sweep Grid",
            "Lays the pictures of a sweep out on one sheet: a row for each concept, its steps below.",
            ["labelled grid", "contact sheet", "xy plot"],
            inputs=[
                io.Image.Input("images", tooltip="The pictures, in the order of 'Sweep Direction'."),
                io.String.Input(
                    "labels",
                    force_input=True,
                    tooltip="What to write below them, a line for each column, from 'Sweep Direction'.",
                ),
                io.String.Input("title", default="steps", tooltip="What to write above them."),
            ],
            outputs=[io.Image.Output(display_name="picture", tooltip="The sheet, as one picture.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: Tensor, labels: str, title: str = "steps") -> io.NodeOutput:
        lines = [line.strip() for line in str(labels).splitlines() if line.strip()]
        if not lines:
            raise PitError("labels is empty; connect the labels of 'Sweep Direction'.")
        picture = to_image(sweep_grid(to_pictures(images, "images"), lines, title))
        return io.NodeOutput(picture, ui=ui.PreviewImage(picture, cls=cls))


class PiTPreviewDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        each = DirectionSocket.Input("direction", tooltip="A direction to look at.")
        return schema(
            "PiTPreviewDirection",
            "Preview Direction",
            "Draws how much each token moves along a direction, and how alike several directions are.",
            ["show slider", "inspect direction", "compare directions"],
            inputs=[
                io.Autogrow.Input(
                    "directions",
                    template=io.Autogrow.TemplatePrefix(each, prefix="direction", min=1, max=MAX_INPUTS),
                    tooltip="One, or several of one kind to compare.",
                )
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The drawing that the node shows."),
                io.String.Output(
                    display_name="report", tooltip="What is known of each, and how alike they are."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, directions: dict[str, Any] | None = None) -> io.NodeOutput:
        given = {name: each for name, each in (directions or {}).items() if each is not None}
        found = [_direction(each, name) for name, each in given.items()]
        if not found:
            raise PitError("directions is empty; connect at least one direction.")
        picture = to_image(direction_picture(found))
        text = "\n".join([*map(report, found), *similarities(found)])
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), **ui.PreviewText(text).as_dict()}
        return io.NodeOutput(picture, text, ui=shown)


def report(direction: Direction) -> str:
    """What is known of a direction, and what to beware of, in a few lines."""
    return "\n".join([describe(direction), *notes(direction)])


def _reported(direction: Direction) -> io.NodeOutput:
    text = report(direction)
    return io.NodeOutput(direction, text, ui=ui.PreviewText(text))


# inputs that several nodes have


def _step(name: str, tooltip: str) -> Any:
    return io.Float.Input(name, default=1.0, min=-FURTHEST, max=FURTHEST, step=0.05, tooltip=tooltip)


def _mask() -> Any:
    return io.String.Input(
        "token_mask",
        default="",
        tooltip="Which tokens move, such as '0-7', or '0-7: 0.5' for half; all of them when empty.",
    )


def _encoders(adapter: str, encoder: str) -> tuple[Any, Any]:
    return (
        IPAdapterSocket.Input("ip_adapter", optional=True, tooltip=f"{adapter}, which makes the tokens."),
        io.ClipVision.Input("clip_vision", optional=True, tooltip=f"{encoder} that belongs to the adapter."),
    )


def _source() -> tuple[Any, ...]:
    return (
        *_encoders(f"{CLIP}: the adapter", f"{CLIP}: the image encoder"),
        io.Image.Input(
            "image",
            optional=True,
            tooltip=f"{CLIP}: the picture of each row of tokens, cropped to a square.",
        ),
    )


# reading them


def _direction(value: Any, name: str) -> Direction:
    if not isinstance(value, Direction):
        raise PitError(f"{name} is {type(value).__name__}; connect 'Load Direction' or 'Find Direction'.")
    return value


def _encoding(ip_adapter: Any, clip_vision: Any, what: str) -> Encoding:
    if not isinstance(ip_adapter, host.ManagedAdapter):
        raise PitError(f"{what} need ip_adapter: connect 'Load IP-Adapter (Piece it Together)'.")
    if clip_vision is None:
        raise PitError(f"{what} need clip_vision: connect the image encoder of the adapter.")
    return Encoding(clip_vision, ip_adapter)


def _pile(
    name: str, images: Tensor | None, tokens: IPTokens | None, encoding: Encoding | None, clip: bool
) -> Tensor:
    """One row for each picture: its tokens (unit, D), or the features that the adapter reads of it."""
    rows = []
    if tokens is not None:
        found = checked(tokens, f"{name}_tokens")
        if clip:
            raise PitError(f"CLIP features are read off pictures: connect {name}_images, not tokens.")
        rows.append(found.tokens.reshape(-1, found.unit, found.width))
    if images is not None and encoding is not None:
        pictures = to_pictures(images, f"{name}_images")
        rows.append(_features(encoding, pictures, "pad") if clip else encoding.pictures(pictures, "pad"))
    if not rows:
        raise PitError(f"The {name} pile is empty; connect {name}_images or {name}_tokens.")
    if len({row.shape[1:] for row in rows}) > 1:
        raise PitError(f"{name}_images and {name}_tokens have different adapters; encode both with one.")
    return torch.cat(rows)


def _common_adapter(encoding: Encoding | None, *tokens: IPTokens | None) -> str:
    known = {each.adapter for each in tokens if each is not None}
    known |= {encoding.adapter.content_hash} if encoding is not None else set()
    known.discard("")
    if len(known) > 1:
        raise PitError(
            "The piles were encoded with different adapters "
            f"({', '.join(sorted(each[:8] for each in known))}); use one for both."
        )
    return next(iter(known), "")


def _source_of(
    moves: list[tuple[Direction, float]], ip_adapter: Any, clip_vision: Any, image: Tensor | None
) -> Source | None:
    """What the tokens were made of, where a direction changes that."""
    if image is None or all(direction.space == "tokens" for direction, _ in moves):
        return None
    encoding = _encoding(ip_adapter, clip_vision, "Directions in CLIP features")
    features = _features(encoding, to_pictures(image, "image"), "crop")

    def project(rows: Tensor) -> Tensor:
        encoding.managed.projector.load()
        return tokens_from_features(encoding.adapter, rows)

    return Source(features, project)


def _features(encoding: Encoding, pictures: list[Image.Image], fit: str) -> Tensor:
    """Pictures -> what the adapter reads of them, (B, N, W) or (B, W), float32 on the CPU."""
    encoder = encoding.encoder
    tell, done = host.progress(len(pictures)), []
    for start in range(0, len(pictures), CHUNK):
        part = pictures[start : start + CHUNK]
        pixels = preprocess(part, encoder.image_size, fit, mean=encoder.mean, std=encoder.std)
        done.append(picture_features(encoder, encoding.adapter, pixels, CHUNK))
        tell(start + len(part))
    return torch.cat(done)


def _repeated(latent: Any, rows: int, columns: int) -> dict[str, Any]:
    """The latent once for every picture; the host gives pictures of one number one and the same noise."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, Tensor) or len(samples) not in (1, rows):
        count = f"{len(samples)}" if isinstance(samples, Tensor) else "no"
        raise PitError(f"latent holds {count} latents; give 1, or one for each of the {rows} rows of tokens.")
    order = [row for row in range(rows) for _ in range(columns)]
    first = latent.get("batch_index") or list(range(len(samples)))
    numbers = first if len(first) == rows else [first[0] + row for row in range(rows)]
    made = {**latent, "samples": _taken(samples, order), "batch_index": [numbers[row] for row in order]}
    mask = latent.get("noise_mask")
    if isinstance(mask, Tensor) and mask.ndim > 2 and len(mask) == len(samples):
        made["noise_mask"] = _taken(mask, order)
    return made


def _taken(batch: Tensor, order: list[int]) -> Tensor:
    return batch[[row if len(batch) > 1 else 0 for row in order]]
