"""IP tokens themselves: combine, save, load, look at."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..pit_core.errors import PitError
from ..pit_core.ip_adapter.token_picture import token_picture
from ..pit_core.ip_adapter.tokens import OPERATIONS, IPTokens, combine, load_ip_tokens, save_ip_tokens
from . import host
from .images import to_image
from .sockets import IPTokensSocket, naming, schema

MAX_INPUTS = 12
NOTHING = "(nothing saved yet)"


class PiTCombineTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        each = IPTokensSocket.Input("tokens", tooltip="IP tokens of the same adapter.")
        return schema(
            "PiTCombineTokens",
            "Combine IP Tokens",
            "Makes one set of tokens out of several, or out of the rows of a single one.",
            ["merge embeds", "mix images", "blend tokens"],
            inputs=[
                io.Autogrow.Input(
                    "tokens",
                    template=io.Autogrow.TemplatePrefix(each, prefix="tokens", min=1, max=MAX_INPUTS),
                    tooltip="Two or more; or a single one, whose rows are combined.",
                ),
                io.Combo.Input(
                    "operation",
                    options=list(OPERATIONS),
                    default="concat",
                    tooltip="concat: all are seen side by side. norm-average: mean direction at mean length. "
                    "subtract: the first less the mean of the rest. slerp: along the arc between two.",
                ),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For slerp: how far to go from the first (0) to the second (1).",
                ),
            ],
            outputs=[
                IPTokensSocket.Output(
                    display_name="tokens", tooltip="The combination, with the nulls of the first."
                )
            ],
        )

    @classmethod
    def execute(
        cls, tokens: dict[str, Any] | None = None, operation: str = "concat", amount: float = 0.5
    ) -> io.NodeOutput:
        given = {name: value for name, value in (tokens or {}).items() if value is not None}
        inputs = [checked(value, name) for name, value in given.items()]
        return io.NodeOutput(combine(inputs, operation, amount, names=list(given)))


class PiTSaveTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTSaveTokens",
            "Save IP Tokens",
            "Writes tokens to output/ip_tokens, where 'Load IP Tokens' finds them.",
            ["save embeds", "export tokens"],
            inputs=[
                IPTokensSocket.Input("tokens", tooltip="The tokens to keep, with their nulls."),
                io.String.Input(
                    "filename_prefix",
                    default="tokens",
                    tooltip="The name to which a number is added; subfolders with '/'.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, tokens: IPTokens, filename_prefix: str = "tokens") -> io.NodeOutput:
        path, name = host.new_file(host.TOKENS, filename_prefix)
        save_ip_tokens(path, checked(tokens, "tokens"))
        return io.NodeOutput(ui=ui.PreviewText(f"Saved {tokens} as {name}"))


class PiTLoadTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTLoadTokens",
            "Load IP Tokens",
            "Reads tokens that 'Save IP Tokens' or `pit sample` wrote.",
            ["load embeds", "import tokens"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=host.files_in(host.TOKENS) or [NOTHING],
                    tooltip="A file in output/ip_tokens; press R to see new ones.",
                )
            ],
            outputs=[
                IPTokensSocket.Output(
                    display_name="tokens", tooltip="The tokens as they were saved, with their nulls."
                )
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        return host.state_of(host.TOKENS, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        if file == NOTHING:
            raise PitError("file: no tokens have been saved yet; save some with 'Save IP Tokens'.")
        with naming("file"):
            tokens = load_ip_tokens(host.path_of(host.TOKENS, file))
        return io.NodeOutput(tokens, ui=ui.PreviewText(report(tokens)))


class PiTPreviewTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "PiTPreviewTokens",
            "Preview IP Tokens",
            "Draws each row's token lengths and how similar the tokens are to each other, and the rows.",
            ["show tokens", "inspect embeds"],
            inputs=[IPTokensSocket.Input("tokens", tooltip="The tokens to look at.")],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="The drawing that the node shows."),
                io.String.Output(display_name="summary", tooltip="How many rows and tokens, and how wide."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, tokens: IPTokens) -> io.NodeOutput:
        picture = to_image(token_picture(checked(tokens, "tokens")))
        shown = {**ui.PreviewImage(picture, cls=cls).as_dict(), **ui.PreviewText(report(tokens)).as_dict()}
        return io.NodeOutput(picture, str(tokens), ui=shown)


def report(tokens: IPTokens) -> str:
    """What a picture of tokens does not say, in short lines: how many, how long, where they come from."""
    lengths = tokens.tokens.norm(dim=-1)
    others = {name: value for name, value in tokens.tensors().items() if name != "tokens"}
    carried = [f"{name} (length {value.norm(dim=-1).mean():.3g})" for name, value in others.items()]
    lines = [
        str(tokens),
        f"lengths {lengths.min():.3g} to {lengths.max():.3g}, mean {lengths.mean():.3g}",
        *(f"with {each}" for each in carried or ["neither null nor white"]),
        f"made with adapter {tokens.adapter[:8]}" if tokens.adapter else "made with an unknown adapter",
    ]
    return "\n".join(lines)


def checked(value: Any, name: str) -> IPTokens:
    """The value, if it is IP tokens; else PitError that names the input."""
    if not isinstance(value, IPTokens):
        raise PitError(
            f"{name} is {type(value).__name__}, not IP tokens; convert EMBEDS with their own node."
        )
    return value
