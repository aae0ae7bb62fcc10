"""What to tell the text encoder: prompts that describe both panels. Diptych Prompting, arXiv 2411.15466.

Articles are put right, because a subject is named three times and not always with one: "cat" and "a cat"
both give "images of same cat", "a photo of a cat" and "replicate this cat".
"""

from __future__ import annotations

import re

from ..errors import PitError

TASKS = ("subject", "style", "edit", "custom")

SUBJECT = (
    "A diptych with two side-by-side images of same {subject}. On the left, a photo of {a_subject}. "
    "On the right, replicate this {subject} exactly but as {target}"
)
STYLE = (
    "A diptych with two side-by-side images of same style. On the left, {a_subject}. "
    "On the right, replicate this style exactly but as {target}"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ARTICLES = _words("a an the")
DETERMINERS = _words(
    "my your his her its our their this that these those some several many two three four five six seven "
    "eight nine ten"
)
PREPOSITIONS = _words("as at by for from in inside of on over under with without")
# Kinds of picture that a text starts with, as in "photo of a cat in the snow".
PICTURES = _words(
    "drawing engraving icon illustration image logo mosaic oil painting pencil photo photograph picture "
    "portrait poster print render rendering sculpture sketch statue sticker watercolor watercolour"
)
PLURALS = _words("people children men women feet teeth mice geese")
SINGULARS = _words("lens canvas atlas gas")  # that end in s; so does what ends as below
SINGULAR_ENDINGS = ("ss", "us", "is")
# Vowels that sound like consonants: a unicorn, a user, a one-eyed cat; but an unidentified object.
LIKE_CONSONANT = re.compile(r"uni(?![dmn])|us[aeiu]|ut[eo]|ur[ai]|uk|eu|ewe|one(?:\b|s)|once\b")
SILENT_H = ("hour", "honest", "honor", "honour", "heir")
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def diptych_prompt(task: str, subject: str, target: str, template: str = "") -> str:
    """The prompt of one of TASKS.

    subject: the thing on the left ("a cat"), for "style" a description of the left picture. target: what the
    right picture shows ("a cat on the moon"). template: for "custom" only. Raises PitError for an unknown
    task and where the task needs a text that is empty.
    """
    if task == "custom":
        return custom_prompt(template, subject, target)
    prompts = {"subject": subject_prompt, "style": style_prompt, "edit": edit_prompt}
    if task not in prompts:
        raise PitError(f"The task is one of {', '.join(TASKS)}, but got '{task}'.")
    return prompts[task](subject, target)


def subject_prompt(subject: str, target: str) -> str:
    """The left panel's subject in another picture."""
    return custom_prompt(SUBJECT, subject, target)


def edit_prompt(subject: str, target: str) -> str:
    """The subject inside the masked part of a given picture; `target` describes that picture as a whole."""
    return custom_prompt(SUBJECT, subject, target)


def style_prompt(description: str, target: str) -> str:
    """The style of the left picture, which `description` describes, in a picture of something else."""
    return custom_prompt(STYLE, description, target)


def custom_prompt(template: str, subject: str = "", target: str = "") -> str:
    """A template with {subject} (no article), {a_subject} (with one) and {target} filled in.

    Raises PitError for an empty template, another placeholder, and a placeholder whose text is empty.
    """
    if not template.strip():
        raise PitError(
            "The prompt's template is empty; write one, such as 'A diptych of {subject}, {target}'."
        )
    subject, target = _tidied(subject), _tidied(target)

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in ("subject", "a_subject", "target"):
            raise PitError(
                f"The template has {{{name}}}, but can only be filled with {{subject}}, {{a_subject}} and "
                "{target}."
            )
        text = target if name == "target" else subject
        if not text:
            raise PitError(f"The {name.removeprefix('a_')} is empty; say in a few words what it is.")
        fillers = {"subject": without_article, "a_subject": with_article}
        return fillers[name](text) if name in fillers else _target(text, subject)

    return PLACEHOLDER.sub(fill, template.strip())


# articles


def without_article(noun: str) -> str:
    """ "a red cat" -> "red cat"."""
    first, _, rest = noun.strip().partition(" ")
    return rest.strip() if first.lower() in ARTICLES and rest.strip() else noun.strip()


def with_article(noun: str) -> str:
    """ "red cat" -> "a red cat"; an article that is there stays, plurals and names take none."""
    noun = noun.strip()
    first, _, rest = noun.partition(" ")
    if first.lower() in ARTICLES and rest.strip():
        return f"{first.lower()} {rest.strip()}"
    if first.lower() in PICTURES:  # its capital starts the text, it does not make a name
        first = first.lower()
        noun = f"{first} {rest}".strip()
    if first.lower() in DETERMINERS | PREPOSITIONS or first.isdigit() or _is_name(first) or _is_plural(noun):
        return noun
    return f"{'an' if _starts_with_vowel_sound(first) else 'a'} {noun}"


def _target(text: str, subject: str) -> str:
    """The target as it reads after "but as": "photo of a cat" and "cat on the moon" get their article."""
    first, bare = text.partition(" ")[0].lower(), without_article(subject)
    if first in ARTICLES | PICTURES:
        return with_article(text)
    for start in (text, text[:1].lower() + text[1:]):
        if bare and re.match(rf"{re.escape(bare)}\b", start):
            return with_article(start)
    return text


def _tidied(text: str) -> str:
    return " ".join(text.split()).rstrip(" .,;:")


def _is_name(word: str) -> bool:
    return word[:1].isupper() and not word.isupper()


def _is_plural(noun: str) -> bool:
    """Whether the noun's main word, the last one before "of", "with" or "wearing", looks like a plural."""
    words = noun.lower().partition(",")[0].split()
    end = next((i for i, word in enumerate(words) if i and _ends_a_noun(word, words[i + 1 :])), len(words))
    head = words[end - 1]
    if head in PLURALS or head in SINGULARS:
        return head in PLURALS
    return len(head) > 3 and head.endswith("s") and not head.endswith(SINGULAR_ENDINGS)


def _ends_a_noun(word: str, following: list[str]) -> bool:
    return word in PREPOSITIONS or (word.endswith("ing") and bool(following))


def _starts_with_vowel_sound(word: str) -> bool:
    lower = word.lower()
    if lower[:1].isdigit():
        return lower.startswith("8") or re.match(r"(11|18)(?!\d)", lower) is not None
    letters = re.match(r"[^\W\d_]*", lower)
    spelled = letters[0] if letters else ""
    if spelled and ((word.isupper() and len(spelled) <= 3) or not re.search("[aeiouy]", spelled)):
        return spelled[0] in "aefhilmnorsx"  # letters said one by one: an LED, an rc car, a UFO
    return lower.startswith(SILENT_H) or (lower[:1] in tuple("aeiou") and not LIKE_CONSONANT.match(lower))
