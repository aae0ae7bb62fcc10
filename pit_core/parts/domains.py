"""Domains of generated part data: prompts out of templates and word banks, and which parts to look for.

A domain is a YAML file; the ones that come with the pack are in `domains/`, and one's own has the same form:

    about: Plush toys.                    # optional
    templates:                            # one is chosen for each picture, its {slots} filled from the
      - "a {mood} {animal} plush toy on a white background"   # banks; pictures of one's own need none
    words:
      mood: [smiling, sleepy]
      animal: [fox, owl]
    negative: "blurry, cropped"           # optional, for models that read one
    set: "{animal}"                       # optional: pictures with the same name here serve as references
    parts:                                # kind: what a detector looks for; or `everything` for whatever
      head: animal head                   # a segmentation model finds
    masks: {least: 2}                     # optional, see masks.MaskFilter
"""

from __future__ import annotations

import difflib
import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import PitError
from ..files import existing_file
from .masks import MaskFilter

FOLDER = Path(__file__).parent / "domains"
EVERYTHING = "everything"
KEYS = ("about", "templates", "words", "negative", "set", "parts", "masks")
KIND = re.compile(r"[a-z][a-z0-9-]*")  # it becomes part of file names


@dataclass(frozen=True)
class Prompt:
    """What a picture is drawn from, and the set that it belongs to."""

    text: str
    set: str


@dataclass(frozen=True)
class Domain:
    """Templates with {slots}, the banks that fill them, and the parts to look for.

    parts: kind -> what a detector is asked for; empty means everything that a segmentation model finds.
    set: a template for the name that wholes of one kind share; the domain's own name by default.
    """

    name: str
    templates: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]
    negative: str = ""
    set: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    masks: MaskFilter = field(default_factory=MaskFilter)
    about: str = ""

    def prompt(self, seed: int, index: int) -> Prompt:
        """The prompt of one picture: a function of these numbers and of the domain alone.

        A slot that stands in a template twice gets two different words, as far as its bank reaches.
        Raises PitError for a domain without templates.
        """
        if not self.templates:
            raise PitError(f"The domain '{self.name}' has no templates to draw pictures from; add some.")
        chance = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
        template = self.templates[int(chance.integers(len(self.templates)))]
        chosen = {slot: _shuffled(bank, chance) for slot, bank in self.words.items()}
        first = {slot: words[0] for slot, words in chosen.items()}
        return Prompt(_filled(template, chosen), self.set.format(**first) or self.name)


def prompts(domain: Domain, seed: int, count: int) -> list[str]:
    """The first `count` prompts of a seed."""
    return [domain.prompt(seed, index).text for index in range(count)]


def shipped_domains() -> list[str]:
    """The names of the domains that come with the pack."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_domain(named: str | os.PathLike[str]) -> Domain:
    """A domain by its name or by its YAML file.

    Raises PitError for an unknown name, a file that is missing or no YAML, names that are unknown, values of
    another type, slots without a bank and banks without a slot, and out of place characters.
    """
    import yaml

    known = shipped_domains()
    path = Path(named)
    if str(named) in known:
        path = FOLDER / f"{named}.yaml"
    elif path.suffix.lower() not in (".yaml", ".yml"):
        raise PitError(
            f"There is no domain '{named}'; it is {', '.join(known)}, or a YAML file of your own templates."
        )
    try:
        loaded = yaml.safe_load(existing_file(path).read_text("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        first = " ".join(str(error).split())[:150]
        raise PitError(f"'{path.name}' is not readable YAML ({first}).") from error
    try:
        return _domain(path.stem, loaded)
    except PitError as error:
        raise PitError(f"'{path.name}' {error}") from error


def _shuffled(bank: Sequence[str], chance: np.random.Generator) -> list[str]:
    return [bank[i] for i in chance.permutation(len(bank))]


def _filled(template: str, words: Mapping[str, Sequence[str]]) -> str:
    used = dict.fromkeys(words, 0)
    text = ""
    for before, slot, _, _ in string.Formatter().parse(template):
        text += before
        if slot is not None:
            text += words[slot][used[slot] % len(words[slot])]
            used[slot] += 1
    return text


# reading; the messages go on after "'mine.yaml' "


def _domain(name: str, value: Any) -> Domain:
    if not isinstance(value, dict):
        raise PitError(f"should hold 'name: value' lines, got {_kind(value)}.")
    _refuse_unknown(value, KEYS, "name")
    words = {slot: _bank(slot, bank) for slot, bank in _mapping(value, "words").items()}
    templates = _texts(value["templates"], "templates", "templates") if "templates" in value else ()
    group = _text(value, "set")
    used = {slot for template in templates for slot in _slots(template, words)} | set(_slots(group, words))
    if unused := sorted(words.keys() - used):
        raise PitError(f"has the word bank '{unused[0]}', but no template with {{{unused[0]}}}.")
    return Domain(
        name=name,
        templates=templates,
        words=words,
        negative=_text(value, "negative"),
        set=group,
        parts=_parts(value),
        masks=_filter(_mapping(value, "masks")),
        about=_text(value, "about"),
    )


def _slots(template: str, words: Mapping[str, Any]) -> list[str]:
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise PitError(f"has the template {template[:80]!r} with a bracket too many or too few.") from error
    found = []
    for _, slot, form, conversion in pieces:
        if slot is None:
            continue
        if form or conversion or slot not in words:
            near = difflib.get_close_matches(slot, words, n=1)
            hint = f"did you mean {{{near[0]}}}?" if near else "add it to 'words'."
            raise PitError(f"has the slot {{{slot[:50]}}} without a word bank; {hint}")
        found.append(slot)
    return found


def _bank(slot: Any, bank: Any) -> tuple[str, ...]:
    if not isinstance(slot, str) or not slot.isidentifier():
        raise PitError(f"has the word bank {str(slot)[:50]!r}; its name should be one plain word.")
    words = _texts(bank, f"words.{slot}", "words")
    for word in words:
        if "{" in word or "}" in word:
            raise PitError(f"has {word[:50]!r} among words.{slot}; words hold no slots, templates do.")
    if len(set(words)) < len(words):
        twice = next(word for word in words if words.count(word) > 1)
        raise PitError(f"has {twice[:50]!r} twice among words.{slot}; keep one.")
    return words


def _parts(value: Mapping[str, Any]) -> dict[str, str]:
    if value.get("parts") == EVERYTHING:
        return {}
    parts = _mapping(value, "parts")
    if not parts:
        raise PitError(f"lacks 'parts': lines such as 'head: animal head', or the word '{EVERYTHING}'.")
    for kind, phrase in parts.items():
        if not isinstance(kind, str) or not KIND.fullmatch(kind):
            raise PitError(f"has the part {str(kind)[:50]!r}; take small letters, digits and '-'.")
        if not isinstance(phrase, str) or not phrase.strip() or "." in phrase:
            raise PitError(f"should say in words without a full stop what to look for as '{kind}'.")
    return {kind: phrase.strip() for kind, phrase in parts.items()}


def _filter(value: Mapping[str, Any]) -> MaskFilter:
    _refuse_unknown(value, [each.name for each in fields(MaskFilter)], "setting among 'masks'")
    try:
        return MaskFilter(**{str(name): setting for name, setting in value.items()})
    except PitError as error:
        raise PitError(f"has 'masks' that cannot be used: {error}") from error


def _texts(value: Any, name: str, what: str) -> tuple[str, ...]:
    given = value if isinstance(value, list) else []
    for text in given:
        if not isinstance(text, str):  # yes, no and numbers are not words to YAML
            raise PitError(f"has {text!r} among '{name}', which YAML takes for no text; put it in quotes.")
    if not given or not all(text.strip() for text in given):
        raise PitError(f"should have a list of {what} as '{name}', none of them empty.")
    return tuple(text.strip() for text in given)


def _text(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key, "")
    if not isinstance(found, str):
        raise PitError(f"should have text as '{key}', got {_kind(found)}.")
    return found.strip()


def _mapping(value: Mapping[str, Any], key: str) -> dict[Any, Any]:
    found = value.get(key, {})
    if not isinstance(found, dict):
        raise PitError(f"should have 'name: value' lines as '{key}', got {_kind(found)}.")
    return found


def _refuse_unknown(value: Mapping[Any, Any], known: Sequence[str], what: str) -> None:
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}."
            raise PitError(f"has the unknown {what} {str(key)[:50]!r}; {hint}")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "nothing", dict: "lines"}
    return names.get(type(value), "a number")
