"""What part data is generated from: a text-to-image model or a folder of pictures, and what finds the parts.

`DomainSource` puts them together for `generate`: prompts of a domain, a painter, a finder of parts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..cutout import Detector, Segmenter, read_mask
from ..errors import PitError
from ..pictures import picture_files, read_picture
from .canvas import flatten
from .domains import Domain
from .generate import Order, Rejected
from .masks import Found, MaskFilter, Piece, choose_masks, cut_out

Painter = Callable[[Sequence[Order]], Sequence[Image.Image | Rejected]]


class Finder(Protocol):
    """Finds the parts of a picture; `entry` names all that they depend on."""

    entry: Mapping[str, Any]

    def __call__(self, image: Image.Image, order: Order) -> Sequence[Piece] | Rejected | None: ...


@dataclass
class DomainSource:
    """Pictures of a domain's prompts. `model` names the painter's files and settings, for the record."""

    domain: Domain
    seed: int
    paint: Painter
    finder: Finder
    model: Mapping[str, Any]
    batch: int = 1
    entry: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.entry = {"domain": domain_entry(self.domain), "seed": self.seed, "model": dict(self.model)}
        self.entry |= {"parts": dict(self.finder.entry)}

    def order(self, index: int) -> Order:
        prompt = self.domain.prompt(self.seed, index)
        return Order(
            index,
            prompt.text,
            noise_seed(self.seed, index),
            prompt.set,
            name=f"{index:06d}",
            negative=self.domain.negative,
        )

    def draw(self, orders: Sequence[Order]) -> Sequence[Image.Image | Rejected]:
        return self.paint(orders)

    def find(self, image: Image.Image, order: Order) -> Sequence[Piece] | Rejected | None:
        return self.finder(image, order)


class FolderSource:
    """One's own pictures instead of drawn ones, sorted by name; their masks are called by their stems."""

    batch = 1

    def __init__(self, folder: Path, domain: Domain, finder: Finder) -> None:
        if not folder.is_dir():
            raise PitError(f"There is no folder '{folder}'; name the one that holds your pictures.")
        self.files, self.domain, self.finder = picture_files(folder), domain, finder
        if not self.files:
            raise PitError(f"'{folder}' holds no pictures.")
        stems = Counter(path.stem for path in self.files)
        if twice := next((stem for stem, count in stems.items() if count > 1), None):
            raise PitError(f"'{folder}' holds two pictures called '{twice}'; rename one of them.")
        names = sha256("\n".join(path.name for path in self.files).encode()).hexdigest()
        self.entry: Mapping[str, Any] = {
            "domain": domain_entry(domain),
            "model": {"pictures": names},
            "parts": dict(finder.entry),
        }

    @property
    def count(self) -> int:
        return len(self.files)

    def order(self, index: int) -> Order:
        return Order(index, self.files[index].name, 0, self.domain.name, name=self.files[index].stem)

    def draw(self, orders: Sequence[Order]) -> Sequence[Image.Image | Rejected]:
        return [_read(self.files[order.index]) for order in orders]

    def find(self, image: Image.Image, order: Order) -> Sequence[Piece] | Rejected | None:
        return self.finder(image, order)


def noise_seed(seed: int, index: int) -> int:
    """The seed of one picture's noise; below 2^53, so that JSON keeps it everywhere."""
    drawn = np.random.SeedSequence(seed, spawn_key=(index, 1)).generate_state(1, np.uint64)
    return int(drawn[0]) & (2**53 - 1)


def domain_entry(domain: Domain) -> dict[str, str]:
    """The domain's name, and a hash of all that prompts and parts depend on."""
    content = (domain.templates, sorted(domain.words.items()), domain.negative, domain.set)
    asked = (sorted(domain.parts.items()), sorted(asdict(domain.masks).items()))
    return {"name": domain.name, "sha256": sha256(repr((content, asked)).encode()).hexdigest()}


def _read(path: Path) -> Image.Image | Rejected:
    try:
        return flatten(read_picture(path))
    except PitError as error:
        return Rejected(str(error))


# finders


class DetectedParts:
    """The domain's parts by detection and segmentation; or everything that segmentation finds."""

    def __init__(
        self,
        domain: Domain,
        detector: Detector | None,
        segmenter: Segmenter,
        *,
        threshold: float | None = None,
        entry: Mapping[str, Any] | None = None,
    ) -> None:
        if domain.parts and detector is None:
            raise PitError(f"The parts of '{domain.name}' are found by their names; add --detector.")
        if threshold is not None and not 0 < threshold < 1:
            raise PitError(f"Expected a threshold between 0 and 1, got {threshold}.")
        self.domain, self.detector, self.segmenter, self.threshold = domain, detector, segmenter, threshold
        self.entry: Mapping[str, Any] = {**(entry or {}), "threshold": threshold}

    def __call__(self, image: Image.Image, order: Order) -> Sequence[Piece] | Rejected:
        return pieces_of(image, self._found(image), self.domain.masks)

    def _found(self, image: Image.Image) -> list[Found]:
        if self.detector is None or not self.domain.parts:
            return [Found("part", mask) for mask in self.segmenter.everything(image)]
        kinds, phrases = list(self.domain.parts), list(self.domain.parts.values())
        seen = self.detector.find(image, phrases, self.threshold)
        masks = self.segmenter.masks(image, [each.box for each in seen])
        return [Found(kinds[each.phrase], mask) for each, mask in zip(seen, masks, strict=True)]


def pieces_of(image: Image.Image, found: Sequence[Found], settings: MaskFilter) -> list[Piece] | Rejected:
    """The parts of a picture that pass the filter, cut out, or that there are too few."""
    chosen = choose_masks(found, settings)
    if len(chosen) < settings.least:
        words = f"{len(chosen)} of at least {settings.least} parts"
        return Rejected(f"{words} found ({len(found)} before the filter).")
    return [cut_out(image, each) for each in chosen]


class GivenMasks:
    """Masks out of a folder: `000003_head.png` and `000003_head_2.png` are masks of the picture 000003.

    White is the part, or, in pictures with transparency, what is opaque. A domain without part names takes
    `000003_0.png`, `000003_1.png`, ... Masks are taken as they are, without the filter.
    """

    def __init__(self, folder: Path, domain: Domain) -> None:
        if not folder.is_dir():
            raise PitError(f"There is no folder '{folder}' of masks; make it, it may be empty at first.")
        kinds = "|".join(re.escape(kind) for kind in domain.parts)
        pattern = re.compile(rf"(.+)_({kinds})(?:_\d+)?" if kinds else r"(.+)_()\d+")
        self.entry: Mapping[str, Any] = {"masks": "given"}
        self._masks: dict[str, list[tuple[str, Path]]] = {}
        for path in picture_files(folder):
            if match := pattern.fullmatch(path.stem):
                self._masks.setdefault(match[1], []).append((match[2] or "part", path))

    def __call__(self, image: Image.Image, order: Order) -> Sequence[Piece] | None:
        masks = self._masks.get(order.name)
        if not masks:
            return None
        return [cut_out(image, Found(kind, read_mask(path))) for kind, path in masks]
