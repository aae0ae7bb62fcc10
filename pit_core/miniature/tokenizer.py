"""The miniature's tokenizer: one token per word of a small fixed vocabulary."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .critters import BUILD_WORDS, COLOUR_NAMES, KINDS, SCENE_PHRASES, SHAPES, STYLES

PAD, START, UNKNOWN, END = range(4)

_EXTRA = """
    a an the of and with in on at to from by , . only critter creature animal monster part picture photo
    drawing sheet character several angles front back side view views large small big tiny clean white
    background plain scene best high quality monochrome lowres bad anatomy worst low good nice cute
    scary happy sad style same image images diptych two side-by-side left right replicate this exactly
    but as imaginary fantasy displaying we can see half-completed partially colored sketches sketch
    different parts object middle one thin wide ear eye wing horn antennae tails no without not is it
    its stands sits standing under near behind before sunny dark bright snq w@z sks toy paper-cut
    cut-out
"""


def vocabulary() -> list[str]:
    """All words, special ones first; the order is fixed, new words go to the end."""
    words = ["<pad>", "<start>", "<unknown>", "<end>"]
    named = [
        *KINDS,
        *COLOUR_NAMES,
        *STYLES,
        *BUILD_WORDS,
        *(shape for shapes in SHAPES.values() for shape in shapes),
    ]
    phrases = " ".join(SCENE_PHRASES.values()).split()
    for word in [*named, *phrases, *_EXTRA.split()]:
        if word not in words:
            words.append(word)
    return words


class WordTokenizer:
    """Text to token ids; unknown words are named in a warning and read as ``<unknown>``."""

    def __init__(self, length: int) -> None:
        self.words = vocabulary()
        self.length = length
        self._index = {word: index for index, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def split(self, text: str) -> list[str]:
        """The text's words and marks, in lower case."""
        return re.findall(r"[\w@-]+|,|\.", text.lower())

    def unknown(self, text: str) -> list[str]:
        """The words that are not in the vocabulary."""
        return [word for word in self.split(text) if word not in self._index]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, length) int64: start, words, end, padding; longer texts are cut."""
        rows = torch.full((len(texts), self.length), PAD, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            if unknown := sorted(set(self.unknown(text))):
                warnings.warn(f"the miniature does not know these words: {', '.join(unknown)}", stacklevel=2)
            ids = [START, *(self._index.get(w, UNKNOWN) for w in self.split(text)[: self.length - 2]), END]
            row[: len(ids)] = torch.tensor(ids)
        return rows
