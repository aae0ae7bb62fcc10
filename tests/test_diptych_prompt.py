"""Prompts of a diptych: the published wording, articles, templates of one's own."""

import pytest

from pit_core.diptych.prompt import (
    TASKS,
    custom_prompt,
    diptych_prompt,
    edit_prompt,
    style_prompt,
    subject_prompt,
    with_article,
    without_article,
)
from pit_core.errors import PitError


@pytest.mark.parametrize("subject", ["cat", "a cat", "A cat", "the cat.", "  a   cat "])
def test_a_subject_is_named_right_however_it_is_typed(subject):
    a = "the" if "the" in subject else "a"
    assert subject_prompt(subject, "photo of a cat on the moon.") == (
        f"A diptych with two side-by-side images of same cat. On the left, {a} photo of {a} cat. "
        "On the right, replicate this cat exactly but as a photo of a cat on the moon"
    ).replace("the photo", "a photo")


def test_style():
    assert style_prompt("watercolor of a house", "a fox in a forest") == (
        "A diptych with two side-by-side images of same style. On the left, a watercolor of a house. "
        "On the right, replicate this style exactly but as a fox in a forest"
    )
    assert "On the left, an oil painting of a house." in style_prompt("Oil painting of a house", "a fox")
    assert "On the left, in blue ink, a house." in style_prompt("in blue ink, a house", "a fox")


def test_an_edit_names_the_subject_as_the_subject_task_does():
    assert edit_prompt("teapot", "a kitchen table") == subject_prompt("teapot", "a kitchen table")


def test_every_task_by_its_name():
    for task, function in (("subject", subject_prompt), ("style", style_prompt), ("edit", edit_prompt)):
        assert diptych_prompt(task, "dog", "a dog in snow") == function("dog", "a dog in snow")
    assert diptych_prompt("custom", "dog", "snow", "Two views of {a_subject}: {target}") == (
        "Two views of a dog: snow"
    )
    assert set(TASKS) == {"subject", "style", "edit", "custom"}


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("cat", "a cat"),
        ("An owl", "an owl"),
        ("old cat", "an old cat"),
        ("stuffed animal", "a stuffed animal"),
        ("berry bowl", "a berry bowl"),
        ("grey sloth plushie", "a grey sloth plushie"),
        ("pink sunglasses", "pink sunglasses"),
        ("glasses", "glasses"),
        ("pair of glasses", "a pair of glasses"),
        ("cat wearing glasses", "a cat wearing glasses"),
        ("oil painting", "an oil painting"),
        ("children", "children"),
        ("pandas", "pandas"),
        ("glass", "a glass"),
        ("octopus", "an octopus"),
        ("lens", "a lens"),
        ("dragon with wings", "a dragon with wings"),
        ("bus", "a bus"),
        ("three dogs", "three dogs"),
        ("2 dogs", "2 dogs"),
        ("my dog", "my dog"),
        ("Eiffel Tower", "Eiffel Tower"),
        ("the Eiffel Tower", "the Eiffel Tower"),
        ("unicorn", "a unicorn"),
        ("used car", "a used car"),
        ("umbrella", "an umbrella"),
        ("unidentified object", "an unidentified object"),
        ("ukulele", "a ukulele"),
        ("European castle", "European castle"),
        ("european castle", "a european castle"),
        ("one-eyed cat", "a one-eyed cat"),
        ("onesie", "a onesie"),
        ("hourglass", "an hourglass"),
        ("house", "a house"),
        ("rc car", "an rc car"),
        ("LED lamp", "an LED lamp"),
        ("UFO", "a UFO"),
        ("8-bit hero", "an 8-bit hero"),
        ("18-wheeler", "an 18-wheeler"),
        ("1800-watt heater", "a 1800-watt heater"),
    ],
)
def test_articles(noun, expected):
    assert with_article(noun) == expected


def test_an_article_goes_where_none_belongs():
    assert [without_article(noun) for noun in ("a cat", "The red cat", "cat", "another cat", "a")] == [
        "cat",
        "red cat",
        "cat",
        "another cat",
        "a",
    ]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("cat on the moon", "a cat on the moon"),
        ("Photo of a cat", "a photo of a cat"),
        ("Cat on the moon", "a cat on the moon"),
        ("A photo of a cat", "a photo of a cat"),
        ("oil painting of a cat", "an oil painting of a cat"),
        ("riding a bicycle", "riding a bicycle"),
        ("caterpillar food", "caterpillar food"),
        ("the same cat, asleep", "the same cat, asleep"),
    ],
)
def test_a_target_gets_an_article_only_where_it_surely_lacks_one(target, expected):
    assert custom_prompt("{target}", "cat", target) == expected


def test_a_template_is_filled_once():
    assert (
        custom_prompt(" {subject}, {subject} as {target} ", "the {target}", "x") == "{target}, {target} as x"
    )


def test_a_template_needs_no_text_that_it_does_not_name():
    assert custom_prompt("Two panels, {target}.", target="a fox") == "Two panels, a fox."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("subject", "", "a cat"), "The subject is empty"),
        (("subject", " .", "a cat"), "The subject is empty"),
        (("style", "a house", "\n"), "The target is empty"),
        (("edit", "", "a cat"), "The subject is empty"),
        (("custom", "cat", "a cat"), "template is empty"),
        (("custom", "cat", "a cat", "a {thing}"), "has {thing}, but can only be filled with {subject}"),
        (("custom", "cat", "a cat", "a {}"), "has {}, but can"),
        (("custom", "", "a cat", "{a_subject}"), "The subject is empty"),
        (("Subject", "cat", "a cat"), "one of subject, style, edit, custom, but got 'Subject'"),
    ],
)
def test_bad_input_is_named_in_one_sentence(arguments, message):
    with pytest.raises(PitError, match=message):
        diptych_prompt(*arguments)
