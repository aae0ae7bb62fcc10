"""IP tokens as people pass them around: the tokens themselves, their nulls, where they come from; and files.

A token file is safetensors with `kind` "ip_tokens" in its metadata; `pit sample` writes such files too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ..errors import PitError
from ..files import check_finite, hash_tensors, load_tensors, save_tensors
from .adapter import IPAdapter

KIND = "ip_tokens"
VERSION = 1
EXTRAS = ("null", "white", "reference")


@dataclass(frozen=True)
class IPTokens:
    """Tokens of pictures after an adapter's projection, float32 on the CPU.

    tokens: (B, T, D). unit: tokens per picture; T is a multiple of it where pictures were concatenated.
    null: (1, unit, D), "no image" for the unconditional half. white: (1, unit, D), of a white picture, which
    the IP-Prior pads with. reference: (1, unit, D), for the prior's reference slot. adapter: content hash of
    the adapter that made them, "" where unknown. Raises PitError for tensors of other shapes and for NaN.
    """

    tokens: Tensor
    unit: int
    null: Tensor | None = None
    white: Tensor | None = None
    reference: Tensor | None = None
    adapter: str = ""

    def __post_init__(self) -> None:
        shape = tuple(self.tokens.shape)
        if len(shape) != 3 or 0 in shape or self.unit < 1 or shape[1] % self.unit:
            raise PitError(
                f"IP tokens have the shape (pictures, {self.unit} tokens or a multiple, width), got {shape}."
            )
        for name in ("tokens", *EXTRAS):
            value = getattr(self, name)
            if value is None:
                continue
            if name != "tokens" and tuple(value.shape) != (1, self.unit, shape[2]):
                raise PitError(
                    f"The {name} of IP tokens has the shape {(1, self.unit, shape[2])}, but got "
                    f"{tuple(value.shape)}."
                )
            object.__setattr__(self, name, value.detach().to("cpu", torch.float32))
        check_finite(self.tensors(), "The IP tokens")

    @property
    def rows(self) -> int:
        """How many pictures' worth of rows there are."""
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        return self.tokens.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        found = {name: getattr(self, name) for name in ("tokens", *EXTRAS)}
        return {name: value for name, value in found.items() if value is not None}

    def content_hash(self) -> str:
        """SHA-256 over the numbers, for caches."""
        return hash_tensors(self.tensors())

    def with_tokens(self, tokens: Tensor) -> IPTokens:
        """Other tokens with the same nulls and origin."""
        return replace(self, tokens=tokens)

    def __str__(self) -> str:
        concatenated = self.tokens.shape[1] // self.unit
        pictures = f"{self.rows} row{'s' if self.rows > 1 else ''} of {self.unit} tokens, width {self.width}"
        return pictures + (f", {concatenated} pictures side by side" if concatenated > 1 else "")


def check_tokens_fit(tokens: IPTokens, adapter: IPAdapter, what: str = "tokens") -> None:
    """Raise PitError unless the adapter's layers can read these tokens; `what` names the input."""
    ours, theirs = (tokens.unit, tokens.width), (adapter.num_tokens, adapter.cross_attention_dim)
    if ours != theirs:
        raise PitError(
            f"The {what} come in {ours[0]}s of width {ours[1]}, but {adapter.name} works with {theirs[0]} of "
            f"width {theirs[1]}; encode them with this adapter."
        )


def unconditional(tokens: IPTokens, negative: IPTokens | None, same: bool = False) -> Tensor:
    """Tokens (1 or B, T, D) for the unconditional half, as many as the conditional half has.

    `same` gives both halves the same; else `negative`, or the tokens' own null. Attention to repeated tokens
    is attention to the tokens, so a shorter half is repeated. Raises PitError where neither is there, and
    where the lengths do not divide.
    """
    if same:
        return tokens.tokens
    found = tokens.null if negative is None else negative.tokens
    if found is None:
        raise PitError(
            "The tokens carry no null for the unconditional half; connect negative tokens, or choose the "
            "same tokens for both halves."
        )
    length, ours = tokens.tokens.shape[1], found.shape[1]
    if found.shape[2] != tokens.width or length % ours:
        raise PitError(
            f"The negative tokens have {ours} tokens of width {found.shape[2]}, but the positive ones "
            f"{length} of width {tokens.width}; encode both with the same adapter."
        )
    return found.repeat(1, length // ours, 1)


# combining


def _normed_average(stack: Tensor) -> Tensor:
    """The mean direction of each token, with the mean length: averaging alone makes tokens shorter."""
    lengths = stack.norm(dim=-1, keepdim=True)
    directions = (stack / lengths.clamp_min(1e-12)).mean(0)
    return directions / directions.norm(dim=-1, keepdim=True).clamp_min(1e-12) * lengths.mean(0)


def _subtracted(stack: Tensor) -> Tensor:
    return stack[0] - stack[1:].mean(0)


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda stack: stack.mean(0),
    "norm-average": _normed_average,
    "add": lambda stack: stack.sum(0),
    "subtract": _subtracted,
    "max": lambda stack: stack.amax(0),
    "min": lambda stack: stack.amin(0),
}
"""(N, B, T, D) -> (B, T, D). subtract: the first less the mean of the rest."""

OPERATIONS = ("concat", *ELEMENTWISE, "slerp")


def combine(
    inputs: Sequence[IPTokens], operation: str, amount: float = 0.5, *, names: Sequence[str] = ()
) -> IPTokens:
    """Several tokens made one; nulls and origin are the first one's.

    Rows go together by number, and one row serves all. A single input with several rows has its rows combined
    into one. concat: side by side along the tokens, all of them seen. slerp: of exactly two, `amount` of the
    way from the first to the second along the arc. names: what messages call the inputs, else "Tokens 1" and
    so on. Raises PitError for tokens that do not go together.
    """
    if operation not in OPERATIONS:
        raise PitError(f"Expected an operation out of {', '.join(OPERATIONS)}, got '{operation}'.")
    if not inputs:
        raise PitError("There are no tokens to combine; connect at least one.")
    first = inputs[0]
    if len(inputs) == 1:
        inputs, names = [first.with_tokens(row[None]) for row in first.tokens], ()
    names = names or [f"Tokens {number}" for number in range(1, len(inputs) + 1)]
    _check_together(dict(zip(names, inputs, strict=True)), same_length=operation != "concat")
    rows = max(each.rows for each in inputs)
    tensors = [each.tokens.expand(rows, -1, -1) for each in inputs]
    if operation == "concat":
        return first.with_tokens(torch.cat(tensors, dim=1))
    if operation == "slerp":
        if len(tensors) != 2:
            raise PitError(f"slerp goes from one to another, but got {len(tensors)} tokens; connect two.")
        return first.with_tokens(slerp(tensors[0], tensors[1], amount))
    if operation == "subtract" and len(tensors) < 2:
        raise PitError("subtract takes the mean of the others from the first, but got one; connect two.")
    return first.with_tokens(ELEMENTWISE[operation](torch.stack(tensors)))


def slerp(a: Tensor, b: Tensor, amount: float) -> Tensor:
    """Each token moved along the arc from a to b, (B, T, D) each; lengths are interpolated evenly.

    Shoemake 1985, "Animating Rotation with Quaternion Curves". Raises PitError for an amount outside 0-1.
    """
    if not 0 <= amount <= 1:
        raise PitError(f"Expected the amount to be from 0 (the first) to 1 (the second), got {amount!r}.")
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    u, v = a / length_a.clamp_min(1e-12), b / length_b.clamp_min(1e-12)
    cosine = (u * v).sum(-1, keepdim=True).clamp(-1, 1)
    angle = torch.arccos(cosine)
    straight = angle.sin() < 1e-4  # parallel, or opposite, where no arc is shorter than another
    safe = torch.where(straight, torch.ones_like(angle), angle)
    arc = (((1 - amount) * safe).sin() * u + (amount * safe).sin() * v) / safe.sin()
    length = (1 - amount) * length_a + amount * length_b
    return torch.where(straight, (1 - amount) * a + amount * b, arc * length)


def _check_together(inputs: Mapping[str, IPTokens], same_length: bool) -> None:
    name, first = next(iter(inputs.items()))
    rows = max(each.rows for each in inputs.values())
    for other, each in inputs.items():
        if (each.unit, each.width) != (first.unit, first.width):
            raise PitError(
                f"{other} come in {each.unit}s of width {each.width}, {name} in {first.unit}s of width "
                f"{first.width}; they belong to different adapters."
            )
        if same_length and each.tokens.shape[1] != first.tokens.shape[1]:
            raise PitError(
                f"{other} are {each.tokens.shape[1]} to a row, {name} {first.tokens.shape[1]}; "
                "only concat takes different lengths."
            )
        if each.rows not in (1, rows):
            raise PitError(f"{other} have {each.rows} rows, others {rows}; give 1 or {rows}.")


# files


def save_ip_tokens(
    path: str | PathLike[str], tokens: IPTokens, metadata: dict[str, object] | None = None
) -> None:
    """Write a token file, completely or not at all. Raises PitError for a place that cannot be written."""
    own = {"kind": KIND, "version": str(VERSION), "unit": str(tokens.unit), "adapter": tokens.adapter}
    save_tensors(path, tokens.tensors(), {**(metadata or {}), **own})


def load_ip_tokens(path: str | PathLike[str]) -> IPTokens:
    """Read a token file. Raises PitError for a file that is missing, damaged, or of another kind."""
    name = Path(path).name
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != KIND or "tokens" not in tensors:
        what = f"a file of kind '{metadata['kind'][:40]}'" if "kind" in metadata else "another kind of file"
        raise PitError(f"'{name}' is {what}, not IP tokens; choose one that 'Save IP tokens' wrote.")
    version = metadata.get("version", "1")
    if not version.isdecimal() or int(version) > VERSION:
        raise PitError(
            f"'{name}' has format version {version[:20]}, newer than this release reads; update it."
        )
    tokens = tensors["tokens"]
    unit = metadata.get("unit", str(tokens.shape[1]) if tokens.ndim == 3 else "0")
    if not unit.isdecimal() or not all(t.is_floating_point() for t in tensors.values()):
        raise PitError(f"'{name}' is damaged: its tokens are not floats, or their count is missing.")
    try:
        extras = {key: tensors[key] for key in EXTRAS if key in tensors}
        return IPTokens(tokens, int(unit), adapter=metadata.get("adapter", ""), **extras)
    except PitError as error:
        raise PitError(f"'{name}' is damaged. {error}") from error
