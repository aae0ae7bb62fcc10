"""Training data of IP-LoRAs: a target picture, its caption, and the reference that is shown beside it.

Either a folder: targets/NAME.jpg with targets/NAME.txt, and refs/NAME_ref.jpg; or a manifest of JSON lines
{"target": ..., "ref": ..., "caption": ...} whose paths start from its own folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import PitError
from ..files import existing_file
from ..parts.canvas import flatten
from ..parts.look import Skipped, look_at, report_skipped
from ..parts.manifest import path_below
from ..pictures import picture_files, read_picture
from .buckets import Size
from .captioned import Picture, Tensors, as_pixels, centre_crop, read_json_rows
from .ip_lora_prompts import prompt_for
from .loop import Item

TARGETS, REFS, REF = "targets", "refs", "_ref"


@dataclass(frozen=True)
class Pair:
    """A target, its reference (paths below the data's folder) and its caption."""

    target: str
    ref: str
    caption: str


@dataclass(frozen=True)
class Example(Picture):
    """A target that can be read, with its prompt as `text`, and its reference. sha256: of both pictures."""

    ref: Path


def read_examples(
    data: Path, prompt: str, index: Path, *, quiet: bool = False
) -> tuple[list[Example], list[Skipped]]:
    """The examples of a folder or manifest, in order, and what is left out of it and why, with a warning.

    prompt: see `prompt_for`. index: a file that remembers the pictures, see `look_at`. Raises PitError when
    nothing is left, and as `read_pairs`.
    """
    pairs, skipped = read_pairs(data)
    folder = data if data.is_dir() else data.parent
    found = look_at([name for pair in pairs for name in (pair.target, pair.ref)], folder, index, quiet=quiet)
    examples = []
    for pair in pairs:
        target, ref = found[pair.target], found[pair.ref]
        if error := target.get("error") or ref.get("error"):
            skipped.append(Skipped(pair.target, error))
            continue
        both = sha256(f"{target['sha256']} {ref['sha256']}".encode()).hexdigest()
        size = target["width"], target["height"]
        text = prompt_for(prompt, pair.caption)
        examples.append(Example(folder / pair.target, text, both, *size, folder / pair.ref))
    report_skipped(skipped, len(examples) + len(skipped), "examples")
    if not examples:
        raise PitError(f"Nothing in '{data}' can be trained on; the first reason: {skipped[0].reason}")
    return examples, skipped


def read_pairs(data: Path) -> tuple[list[Pair], list[Skipped]]:
    """What a folder or a manifest names; of a folder also the files that lack their counterparts.

    Raises PitError for a place with neither, and for a manifest's row that is wrong, with its number.
    """
    return _of_folder(data) if data.is_dir() else (_of_manifest(existing_file(data)), [])


# folders


def _of_folder(folder: Path) -> tuple[list[Pair], list[Skipped]]:
    missing = [name for name in (TARGETS, REFS) if not (folder / name).is_dir()]
    if missing:
        raise PitError(
            f"'{folder}' lacks the folder {' and '.join(missing)}; expected {TARGETS}/NAME.jpg with "
            f"{TARGETS}/NAME.txt, and {REFS}/NAME{REF}.jpg."
        )
    skipped: list[Skipped] = []
    targets = _by_stem(folder / TARGETS, skipped)
    refs = _by_stem(folder / REFS, skipped)
    texts = {path.stem: path for path in sorted((folder / TARGETS).glob("*.txt"))}
    pairs = []
    stems = [stem.removesuffix(REF) if stem.endswith(REF) else stem for stem in refs]
    for name in sorted({*targets, *texts, *stems}):
        place = f"{TARGETS}/{name}"
        counterparts = {
            f"target {TARGETS}/{name}.jpg": name in targets,
            f"caption {TARGETS}/{name}.txt": name in texts,
            f"reference {REFS}/{name}{REF}.jpg": name + REF in refs,
        }
        if absent := [what for what, there in counterparts.items() if not there]:
            skipped.append(Skipped(place, f"'{name}' has no {' and no '.join(absent)}."))
            continue
        try:
            caption = texts[name].read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError):
            skipped.append(Skipped(place, f"'{TARGETS}/{name}.txt' is not readable as UTF-8 text."))
            continue
        pairs.append(
            Pair(f"{TARGETS}/{targets[name].name}", f"{REFS}/{refs[name + REF].name}", caption.strip())
        )
    if not pairs and not skipped:
        raise PitError(f"'{folder}' holds no pictures; expected some in {TARGETS} and {REFS}.")
    return pairs, skipped


def _by_stem(folder: Path, skipped: list[Skipped]) -> dict[str, Path]:
    """The pictures by name without suffix; a second one of the same name is left out."""
    found: dict[str, Path] = {}
    for path in picture_files(folder):
        first = found.setdefault(path.stem, path)
        if first is not path:
            name = f"{folder.name}/{path.name}"
            skipped.append(Skipped(name, f"'{name}' has the name of {first.name}, which is taken."))
    return found


# manifests


def _of_manifest(path: Path) -> list[Pair]:
    pairs = [_pair(value, number, path) for number, value in read_json_rows(path)]
    if not pairs:
        raise PitError(f"'{path.name}' holds no rows; expected {{target, ref, caption}} ones.")
    return pairs


def _pair(value: Any, number: int, path: Path) -> Pair:
    texts = [value.get(name) if isinstance(value, dict) else None for name in ("target", "ref", "caption")]
    target, ref, caption = texts
    if not (isinstance(target, str) and isinstance(ref, str) and isinstance(caption, str)):
        raise PitError(f"Row {number} of '{path.name}' should be {{target, ref, caption}} with three texts.")
    for name in (target, ref):
        try:
            path_below(path.parent, name)
        except PitError as error:
            raise PitError(f"Row {number} of '{path.name}' names a file wrongly: {error}") from error
    return Pair(target, ref, caption)


# decoded


class Referenced:
    """Decoded targets and references of one size, and tokenised prompts: what `Encoders` reads.

    size: (width, height) of the targets, which are cut to it in the middle. The time ids are those of a
    picture that was made at this size, as the published IP-LoRA was trained. tokenize, preprocess: as in
    `Captioned`, the latter for the reference.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        size: Size,
        tokenize: Callable[[Sequence[str]], Tensor],
        preprocess: Callable[[Image.Image], Tensor],
    ) -> None:
        self.examples, self.size = examples, size
        self.tokenize, self.preprocess = tokenize, preprocess

    def __len__(self) -> int:
        return len(self.examples)

    def fetch(self, items: Sequence[Item]) -> Tensors:
        chosen = [self.examples[index] for _, index in items]
        width, height = self.size
        time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        targets = [centre_crop(read_picture(example.path), self.size)[0] for example in chosen]
        return {
            "pixels": torch.stack([as_pixels(target) for target in targets]),
            "clip_pixels": torch.cat([self.preprocess(flatten(read_picture(e.ref))) for e in chosen]),
            "time_ids": time_ids.repeat(len(chosen), 1),
            "ids": self.tokenize([example.text for example in chosen]),
        }
