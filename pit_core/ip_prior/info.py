"""What is known of a prior beyond its weights: sizes, and how it was trained.

The settings use the names of the released cfg.yaml, in YAML and in a safetensors file's metadata alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import PitError
from .model import IPPriorConfig

# What PyYAML lets through for text that is not UTF-8, a date of month 13, or a '!!bool maybe'.
_BAD_VALUES = (ValueError, KeyError, AttributeError, TypeError)

MAX_YAML_BYTES = 1 << 20  # a real cfg.yaml has about 2 kB

SIZES = {
    "embedding_dim": "embedding_dim",
    "hidden_dim": "hidden_dim",
    "num_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_tokens": "num_tokens",
}
"""cfg.yaml's name of a size -> IPPriorConfig's."""


@dataclass(frozen=True)
class PriorInfo:
    """Sizes and training settings of one prior.

    `use_ref`: slot 0 is reserved for a reference grid. `max_crops`: the most parts seen in training.
    `sketch_prob`: how often parts were shown as sketches. `content_hash`: SHA-256 over the weights, the same
    for the same weights in any file format. `notes`: what had to be assumed, one sentence each.
    """

    config: IPPriorConfig
    use_ref: bool = False
    max_crops: int = 3
    sketch_prob: float = 0.0
    version: int = 1
    content_hash: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.use_ref, bool):
            raise PitError(f"Expected use_ref to be true or false, got {self.use_ref!r}.")
        if isinstance(self.max_crops, bool) or not isinstance(self.max_crops, int) or self.max_crops < 1:
            raise PitError(f"Expected max_crops to be a whole number of at least 1, got {self.max_crops!r}.")
        if not isinstance(self.sketch_prob, int | float) or not 0 <= self.sketch_prob <= 1:
            raise PitError(f"Expected sketch_prob to be a number from 0 to 1, got {self.sketch_prob!r}.")

    @property
    def embedding_dim(self) -> int:
        """Width of a token."""
        return self.config.embedding_dim

    @property
    def num_tokens(self) -> int:
        """Tokens per slot."""
        return self.config.num_tokens

    def settings(self) -> dict[str, Any]:
        """Plain values under cfg.yaml's names, for JSON or YAML; `info_from` reads them back."""
        sizes = {name: getattr(self.config, field) for name, field in SIZES.items()}
        return sizes | {name: getattr(self, name) for name in ("use_ref", "max_crops", "sketch_prob")}


def info_from(
    settings: Mapping[str, Any],
    shapes: Mapping[str, int],
    *,
    qk_norm: bool,
    source: str,
    content_hash: str,
    version: int = 1,
) -> PriorInfo:
    """Settings and the sizes read from the weights (IPPriorConfig's names) made one.

    Raises PitError where the two disagree, naming both values, and for settings of the wrong kind.
    """
    for name, field in SIZES.items():
        if field in shapes and settings.get(name) is not None and settings[name] != shapes[field]:
            raise PitError(
                f"The settings of {source} say {name} {settings[name]!r}, but its weights have "
                f"{shapes[field]}; the two do not belong together."
            )
    given = {field: settings[name] for name, field in SIZES.items() if settings.get(name) is not None}
    training = {
        k: settings[k] for k in ("use_ref", "max_crops", "sketch_prob") if settings.get(k) is not None
    }
    config = IPPriorConfig(**{**given, **shapes}, qk_norm=qk_norm)
    notes = tuple(_assumptions(config, given, training, source))
    return PriorInfo(config, **training, version=version, content_hash=content_hash, notes=notes)


def _assumptions(
    config: IPPriorConfig, given: Mapping[str, Any], training: Mapping[str, Any], source: str
) -> list[str]:
    notes = []
    if "n_heads" not in given:
        notes.append(
            f"{source} does not say its number of attention heads; {config.n_heads} (hidden_dim / 64) is "
            "assumed. Put its cfg.yaml beside it to be sure."
        )
    if "use_ref" not in training:
        notes.append(
            f"{source} does not say whether slot 0 is a reference; none is assumed. "
            "Put its cfg.yaml beside it to be sure."
        )
    return notes


def read_yaml_settings(path: Path) -> dict[str, Any]:
    """A training configuration as a plain dict. Tags of Python objects are ignored, never executed.

    Raises PitError for a file that cannot be read, is no YAML, or is no mapping.
    """
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise PitError(f"'{path.name}' is over {MAX_YAML_BYTES} bytes, too large for a prior's settings.")
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except OSError as error:
        raise PitError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, RecursionError, *_BAD_VALUES) as error:
        raise PitError(f"'{path.name}' is not readable YAML ({_first_line(error)}).") from error
    if not isinstance(loaded, dict):
        raise PitError(f"'{path.name}' should hold 'name: value' lines, got {type(loaded).__name__}.")
    return loaded


class _PlainLoader(yaml.SafeLoader):
    """SafeLoader that reads what it does not know as the plain value under the tag."""


def _without_tag(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)  # type: ignore[arg-type]


_PlainLoader.add_constructor(None, _without_tag)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
