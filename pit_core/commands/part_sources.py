"""What `pit data generate` draws with and finds parts with, by its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cutout import load_detector, load_segmenter
from ..errors import PitError
from ..parts.domains import Domain, load_domain
from ..parts.generate import Source
from ..parts.painter import DiffusersPainter, load_painter, wants_bfloat16
from ..parts.sources import DetectedParts, DomainSource, Finder, FolderSource, GivenMasks
from ..runs import fingerprint
from ..sample import DTYPES, checked_device
from .common import Dtype, place_and_dtype, without_loading_bars

CRITTERS = "critters"


@dataclass(frozen=True)
class Options:
    """The command's. own: files and folders that were named; tuned: what was set of the drawing."""

    domain: str
    seed: int
    batch: int | None
    own: Mapping[str, Path]
    tuned: Mapping[str, Any]
    threshold: float | None
    device: str
    dtype: Dtype

    def refuse(self, why: str, *names: str) -> None:
        """Raise PitError for the first of these options (of all, without names) that was given."""
        searching = {} if self.threshold is None else {"threshold": self.threshold}
        given = {**self.own, **self.tuned, **searching}
        for name in names or given:
            if name in given:
                option = "--" + name.replace("_", "-")
                raise PitError(f"{option} has no use here: {why}; leave it out.")


def critters(options: Options, *, drawn: bool) -> Source:
    """The miniature, or its world alone."""
    from ..miniature.generator import DrawnCritters, PaintedCritters

    options.refuse("critters come from the miniature alone")
    batch = options.batch or 16
    if drawn:
        return DrawnCritters(options.seed, batch)
    place = checked_device("cpu" if options.device == "auto" else options.device)
    without_loading_bars()
    return PaintedCritters(options.seed, batch, device=place)


def from_files(options: Options, *, drawn: bool) -> Source:
    """A domain's prompts and the user's own models or pictures; what is small is looked at first."""
    if drawn:
        raise PitError("--drawn is for critters; other domains need --model or --pictures.")
    domain, own = load_domain(options.domain), options.own
    if ("model" in own) == ("pictures" in own):
        raise PitError(
            f"The pictures of '{domain.name}' need --model (FLUX.1 or SDXL) or --pictures (a folder); "
            "'pit data generate critters' needs neither."
        )
    finder = _finder(domain, options)
    if "pictures" in own:
        options.refuse("--pictures are not drawn", "sdxl_config", "steps", "guidance", "size", "offload")
        return FolderSource(own["pictures"], domain, finder)
    domain.prompt(options.seed, 0)
    painter, dtype = _painter(options)
    entry = {"sha256": fingerprint(own["model"]), "dtype": dtype, **asdict(painter.settings)}
    return DomainSource(domain, options.seed, painter, finder, entry, options.batch or 1)


def _painter(options: Options) -> tuple[DiffusersPainter, str]:
    model = options.own["model"]
    place, dtype = place_and_dtype(True, options.device, options.dtype)
    if place.startswith("cpu"):
        options.refuse("the model is on the CPU as it is", "offload")
    if options.dtype is Dtype.auto and dtype == "float16" and wants_bfloat16(model):
        dtype = "bfloat16"
    config = options.own.get("sdxl_config")
    device = checked_device(place)
    without_loading_bars()
    return load_painter(model, config=config, device=device, dtype=DTYPES[dtype], **options.tuned), dtype


def _finder(domain: Domain, options: Options) -> Finder:
    own = options.own
    if "masks" in own:
        options.refuse("with --masks nothing is searched for", "detector", "segmenter", "threshold")
        return GivenMasks(own["masks"], domain)
    if "segmenter" not in own or (domain.parts and "detector" not in own):
        wanted = "--detector and --segmenter" if domain.parts else "--segmenter"
        raise PitError(f"The parts of '{domain.name}' are found by {wanted}; or give --masks, a folder.")
    if not domain.parts:
        options.refuse(f"the parts of '{domain.name}' have no names", "detector", "threshold")
    device = checked_device(place_and_dtype(True, options.device, options.dtype)[0])
    without_loading_bars()
    detector = load_detector(own["detector"], device=device) if domain.parts else None
    segmenter = load_segmenter(own["segmenter"], device=device)
    entry = {name: fingerprint(own[name]) for name in ("detector", "segmenter") if name in own}
    return DetectedParts(domain, detector, segmenter, threshold=options.threshold, entry=entry)
