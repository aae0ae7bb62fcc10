"""IP+ space in ComfyUI: load an adapter, turn pictures into tokens, apply tokens to a model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui
from PIL.Image import Image
from torch import Tensor

from ..pit_core.errors import PitError
from ..pit_core.ip_adapter.checkpoint import describe_adapter
from ..pit_core.ip_adapter.encode import tokens_from_features
from ..pit_core.ip_adapter.tokens import IPTokens, check_tokens_fit, unconditional
from ..pit_core.ip_adapter.weights import SCALINGS, SCHEDULES, layer_weights
from ..pit_core.parts.canvas import on_white_square, reference_grid
from . import host
from .encoding import Encoding
from .images import to_mask, to_pictures
from .miniature import WEIGHTS as MINIATURE_WEIGHTS
from .sockets import MINIATURE, EmbedsSocket, IPAdapterSocket, IPTokensSocket, naming, schema

FITS = ["crop", "pad", "stretch"]
NULLS = ["as trained", "grey", "black", "white", "zeros"]
MAX_PARTS = 12
HALVES = ["null or negative", "same as positive"]
ROWS = ["pictures", "regions"]


class PiTLoadIPAdapter(io.ComfyNode):
    """A file of the folder `ipadapter`; what it is, is told by its content."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTLoadIPAdapter",
            "Load IP-Adapter (Piece it Together)",
            "Loads an IP-Adapter or IP-Adapter Plus for SDXL or SD1.5 and says which image encoder it needs.",
            ["ipadapter", "ip adapter", "ipadapter plus", "image prompt"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[MINIATURE, *host.files_in("ipadapter")],
                    tooltip="A file in models/ipadapter. What it is, is read from its content, not its name.",
                )
            ],
            outputs=[
                IPAdapterSocket.Output(
                    display_name="ip_adapter", tooltip="The adapter, for the nodes that encode and apply."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What the file is: kind, tokens, width, model family, image encoder.",
                ),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        return "" if file == MINIATURE else host.state_of("ipadapter", file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        name = "ip_adapter_plus.safetensors"
        with naming("file"):
            path = MINIATURE_WEIGHTS / name if file == MINIATURE else host.path_of("ipadapter", file)
            managed = host.load_adapter(path)
        number = managed.adapter.content_hash[:8]  # 'Preview IP Tokens' shows the same
        report = f"{path.name}: {describe_adapter(managed.adapter)}; adapter {number}"
        return io.NodeOutput(managed, report, ui=ui.PreviewText(report))


class PiTEncodeImage(io.ComfyNode):
    """Pictures as they are, one row of tokens each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTEncodeImage",
            "Encode Image to IP Tokens",
            "Turns each picture of a batch into IP tokens: what an IP-Adapter shows to the model in place of "
            "the picture.",
            ["ipadapter encode", "image prompt", "image to tokens", "image embeds"],
            inputs=[
                IPAdapterSocket.Input("ip_adapter", tooltip="The adapter whose tokens are wanted."),
                io.ClipVision.Input("clip_vision", tooltip="The image encoder that belongs to the adapter."),
                io.Image.Input("image", tooltip="One picture or a batch; each becomes one row of tokens."),
                io.Combo.Input(
                    "fit",
                    options=FITS,
                    default="crop",
                    tooltip="What happens to pictures that are not square: crop the ends, pad with white, or "
                    "stretch.",
                ),
                io.Combo.Input(
                    "null",
                    options=NULLS,
                    default="as trained",
                    tooltip="The picture that stands for 'no image' in the unconditional half. As trained: "
                    "grey for Plus adapters, zeros for base ones.",
                ),
                io.Int.Input(
                    "chunk",
                    default=8,
                    min=1,
                    max=256,
                    tooltip="How many pictures are encoded at a time; lower it when memory runs out.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Only what is white in the mask is seen, the rest becomes white paper. The mask "
                    "of Load Image is the other way round: invert it.",
                ),
            ],
            outputs=[
                IPTokensSocket.Output(
                    display_name="tokens",
                    tooltip="One row per picture, with the tokens of 'no image' beside.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: host.ManagedAdapter,
        clip_vision: Any,
        image: Tensor,
        fit: str = "crop",
        null: str = "as trained",
        chunk: int = 8,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        encoding = Encoding(clip_vision, checked_adapter(ip_adapter))
        pictures = to_pictures(image, "image", to_mask(mask))
        tokens = encoding.pictures(pictures, fit, chunk)
        return io.NodeOutput(_tokens(encoding, tokens, None if null == "as trained" else null))


class PiTEncodeParts(io.ComfyNode):
    """Pictures of parts, each on its own white square, in the order that the prior will read."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        part = io.Image.Input("part", tooltip="A picture of one part, or a batch of parts.")
        return schema(
            "PiTEncodeParts",
            "Encode Parts to IP Tokens",
            "Puts each part on a white square, as the IP-Prior was trained, and turns it into IP tokens. "
            "Empty slots are filled by the prior.",
            ["character parts", "sketch", "reference grid"],
            inputs=[
                IPAdapterSocket.Input("ip_adapter", tooltip="The adapter that the prior was trained with."),
                io.ClipVision.Input("clip_vision", tooltip="The image encoder that belongs to the adapter."),
                io.Autogrow.Input(
                    "parts",
                    template=io.Autogrow.TemplatePrefix(part, prefix="part", min=1, max=MAX_PARTS),
                    tooltip="One picture per part, or one batch of parts; the order matters. Transparent "
                    "parts: join image and alpha first.",
                ),
                io.Boolean.Input(
                    "as_sketch",
                    default=False,
                    tooltip="Show the parts as line drawings, for priors that were trained on sketches.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="One to four pictures in the style that is wanted, for priors with a reference "
                    "slot.",
                ),
            ],
            outputs=[
                IPTokensSocket.Output(
                    display_name="parts", tooltip="One row per part, in order, for 'Sample IP-Prior'."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: host.ManagedAdapter,
        clip_vision: Any,
        parts: dict[str, Tensor | None] | None = None,
        as_sketch: bool = False,
        reference: Tensor | None = None,
    ) -> io.NodeOutput:
        encoding = Encoding(clip_vision, checked_adapter(ip_adapter))
        given = {name: to_pictures(batch, name) for name, batch in (parts or {}).items() if batch is not None}
        if not given:
            raise PitError("parts is empty; connect at least one picture of a part.")
        squares = _squares(given, encoding.canvas, as_sketch)
        found = _tokens(encoding, encoding.pictures(squares), None, _reference(encoding, reference))
        return io.NodeOutput(found)


class PiTTokensFromEmbeds(io.ComfyNode):
    """Features before the projection, as another pack saves them, made tokens."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTTokensFromEmbeds",
            "IP Tokens from Embeds",
            "Takes image embeds of the popular IP-Adapter pack (EMBEDS), which are features before the "
            "adapter's projection, and projects them.",
            ["embeds to tokens", "ipadapter embeds"],
            inputs=[
                IPAdapterSocket.Input("ip_adapter", tooltip="The adapter that the embeds were made for."),
                EmbedsSocket.Input("pos_embed", tooltip="The image's embeds."),
                EmbedsSocket.Input(
                    "neg_embed",
                    optional=True,
                    tooltip="The embeds of 'no image', for the unconditional half.",
                ),
            ],
            outputs=[
                IPTokensSocket.Output(
                    display_name="tokens", tooltip="The same pictures as IP tokens, one row for each."
                )
            ],
        )

    @classmethod
    def execute(
        cls, ip_adapter: host.ManagedAdapter, pos_embed: Tensor, neg_embed: Tensor | None = None
    ) -> io.NodeOutput:
        adapter = checked_adapter(ip_adapter).adapter
        tokens = _projected(ip_adapter, pos_embed, "pos_embed")
        null = None if neg_embed is None else _projected(ip_adapter, neg_embed, "neg_embed")[:1]
        return io.NodeOutput(IPTokens(tokens, adapter.num_tokens, null=null, adapter=adapter.content_hash))


class PiTApplyTokens(io.ComfyNode):
    """Tokens on a model: decoupled attention in every text cross-attention layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTApplyTokens",
            "Apply IP Tokens",
            "Lets a model see IP tokens beside its prompt. Use it as often as you like: the tokens add up, "
            "in any order.",
            ["apply ipadapter", "ipadapter advanced", "image prompt", "style transfer", "regional"],
            inputs=[
                io.Model.Input("model", tooltip="An SDXL or SD1.5 model of the adapter's family."),
                IPAdapterSocket.Input("ip_adapter", tooltip="The adapter that the tokens belong to."),
                IPTokensSocket.Input("tokens", tooltip="One row for all pictures, or one row for each."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much they count; 0 is off, in every schedule.",
                ),
                io.Float.Input(
                    "start_at",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the run they begin to count: 0 is the first step.",
                ),
                io.Float.Input(
                    "end_at",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where in the run they cease to count: 1 is the last step.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=list(SCHEDULES),
                    default="even",
                    tooltip="How the weight is spread over the model's layers; style, composition and their "
                    "kin are for SDXL.",
                ),
                io.String.Input(
                    "layer_map",
                    default="",
                    tooltip="For the schedule 'layer map': 'index:weight, ...' from 0 (first) to 10 (last in "
                    "SDXL; 4 is the middle), each times the weight.",
                ),
                io.Float.Input(
                    "composition_weight",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="For the two schedules 'style and composition': the weight of layer 3.",
                ),
                io.Combo.Input(
                    "embeds_scaling",
                    options=list(SCALINGS),
                    default=SCALINGS[0],
                    tooltip="What the weight scales: the tokens' contribution (V only), or their keys too.",
                ),
                io.Combo.Input(
                    "uncond",
                    options=HALVES,
                    default=HALVES[0],
                    tooltip="What the unconditional half sees: the negative tokens or the tokens' own null, "
                    "or the same as the conditional half.",
                ),
                io.Combo.Input(
                    "rows",
                    options=ROWS,
                    default=ROWS[0],
                    tooltip="pictures: row by row for the pictures of the batch. regions: every picture gets "
                    "all rows, each where its own mask is white.",
                ),
                IPTokensSocket.Input(
                    "negative_tokens", optional=True, tooltip="What the unconditional half sees."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where the tokens count: one mask for all, one per picture, or one per region.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The model that sees the tokens; the one given stays as it was.",
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ip_adapter: host.ManagedAdapter,
        tokens: IPTokens,
        weight: float = 1.0,
        start_at: float = 0.0,
        end_at: float = 1.0,
        schedule: str = "even",
        layer_map: str = "",
        composition_weight: float = 1.0,
        embeds_scaling: str = SCALINGS[0],
        uncond: str = HALVES[0],
        rows: str = ROWS[0],
        negative_tokens: IPTokens | None = None,
        mask: Tensor | None = None,
    ) -> io.NodeOutput:
        with naming("model"):
            layers = host.check_model(model, checked_adapter(ip_adapter))
        check_tokens_fit(_ip_tokens(tokens, "tokens"), ip_adapter.adapter)
        if negative_tokens is not None:
            check_tokens_fit(
                _ip_tokens(negative_tokens, "negative_tokens"), ip_adapter.adapter, "negative_tokens"
            )
        if not 0 <= start_at <= end_at <= 1:
            raise PitError(
                f"start_at and end_at run from 0 to 1, the start first, but got {start_at} and {end_at}."
            )
        weights = layer_weights(
            layers, schedule, weight, composition_weight=composition_weight, layer_map=layer_map
        )
        other = unconditional(tokens, negative_tokens, same=uncond == HALVES[1])
        pieces = _pieces(tokens.tokens, other, to_mask(mask), regions=rows == ROWS[1])
        if weight == 0 or not weights:  # off, whatever composition_weight says
            return io.NodeOutput(model)
        applications = host.make_applications(
            model, ip_adapter, pieces, weights, scaling=embeds_scaling, span=(start_at, end_at)
        )
        return io.NodeOutput(host.apply(model, layers, applications))


Piece = tuple[Tensor, Tensor, "Tensor | None"]


def _pieces(cond: Tensor, uncond: Tensor, mask: Tensor | None, regions: bool) -> list[Piece]:
    """What is applied on its own: all rows at once, or in regions each row with its mask."""
    if not regions:
        return [(cond, uncond, mask)]
    if mask is None or len(mask) != len(cond):
        count = "none" if mask is None else str(len(mask))
        raise PitError(
            f"Regions need one mask per row of tokens: there are {len(cond)} rows, and mask holds {count}."
        )
    nulls = uncond.expand(len(cond), -1, -1) if len(uncond) == 1 else uncond
    if len(nulls) != len(cond):
        raise PitError(f"negative_tokens has {len(nulls)} rows, but tokens {len(cond)}; give 1 or as many.")
    return [(cond[i : i + 1], nulls[i : i + 1], mask[i : i + 1]) for i in range(len(cond))]


def _tokens(
    encoding: Encoding, tokens: Tensor, null: str | None, reference: Tensor | None = None
) -> IPTokens:
    adapter = encoding.adapter
    nulls = {"null": encoding.null(null), "white": encoding.null("white"), "reference": reference}
    return IPTokens(tokens, adapter.num_tokens, adapter=adapter.content_hash, **nulls)


def _squares(parts: dict[str, list[Image]], side: int, as_sketch: bool) -> list[Image]:
    """Every part on its own white square, in order; what is wrong with one names its input."""
    if as_sketch:
        from ..pit_core.parts.sketch import as_sketch as draw
    squares = []
    for name, pictures in parts.items():
        for number, picture in enumerate(pictures):
            with naming(name if len(pictures) == 1 else f"{name} (picture {number} of the batch)"):
                square = on_white_square(picture, side)
                squares.append(draw(square) if as_sketch else square)
    return squares


def _reference(encoding: Encoding, reference: Tensor | None) -> Tensor | None:
    if reference is None:
        return None
    pictures = to_pictures(reference, "reference")
    with naming("reference"):
        grid = reference_grid(pictures, encoding.canvas)
    return encoding.pictures([grid])


def _projected(managed: host.ManagedAdapter, embeds: Any, name: str) -> Tensor:
    if not isinstance(embeds, Tensor):
        raise PitError(f"{name} is no tensor of embeds but {type(embeds).__name__}.")
    if 0 in embeds.shape:
        raise PitError(f"{name} is empty (its shape is {tuple(embeds.shape)}); give at least one picture's.")
    managed.projector.load()
    with naming(name):
        return tokens_from_features(managed.adapter, embeds.float()).cpu()


def checked_adapter(value: Any) -> host.ManagedAdapter:
    """What is connected to `ip_adapter`. Raises PitError for anything else."""
    if not isinstance(value, host.ManagedAdapter):
        raise PitError(
            f"ip_adapter is {type(value).__name__}; connect 'Load IP-Adapter (Piece it Together)'."
        )
    return value


def _ip_tokens(value: Any, name: str) -> IPTokens:
    if not isinstance(value, IPTokens):
        raise PitError(
            f"{name} is {type(value).__name__}, not IP tokens; convert EMBEDS with their own node."
        )
    return value
