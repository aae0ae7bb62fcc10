"""B4M's contents and styles in the critter world."""

from __future__ import annotations

from dataclasses import replace

from pit_core.miniature import b4m
from pit_core.miniature.critters import SCENES, Pose, is_held_out
from pit_core.miniature.models import TEXT_LENGTH
from pit_core.miniature.tokenizer import WordTokenizer


def test_every_content_is_joined_with_every_style_and_compared_with_ordinary_loras() -> None:
    names = list(b4m.RUNS)
    assert len(names) == 3 + 2 + 6 + 3 + 2 + 6
    assert {"b4m-content-3", "b4m-style-2", "b4m-join-3-2", "b4m-plain-content-1", "b4m-shared-1-1"} < set(
        names
    )
    assert b4m.RUNS["b4m-join-3-2"].parents == ("b4m-content-3", "b4m-style-2")
    for name, run in b4m.RUNS.items():
        assert all(names.index(parent) < names.index(name) for parent in run.parents)
    assert b4m.RUNS[b4m.SHIPPED[2]].parents == b4m.SHIPPED[:2]
    assert len(b4m.AT_HOME) == len(names) - 3


def test_a_content_is_one_critter_and_a_style_one_surface() -> None:
    everywhere = set(b4m.LEARNED) | set(b4m.UNSEEN)
    assert everywhere == set(SCENES) and not set(b4m.LEARNED) & set(b4m.UNSEEN)
    for content in b4m.CONTENTS:
        shown = [b4m.content_critter(content, index) for index in range(b4m.PICTURES)]
        bare = {replace(critter, pose=Pose(), scene="plain", scene_seed=0) for critter in shown}
        assert bare == {b4m.SUBJECTS[content - 1]}
        assert {critter.scene for critter in shown} == set(b4m.LEARNED)
        assert len({critter.pose for critter in shown}) == b4m.PICTURES
    for style in b4m.STYLES:
        shown = [b4m.style_critter(style, index) for index in range(b4m.PICTURES)]
        assert {critter.style for critter in shown} == {b4m.SURFACES[style - 1]}
        assert len({critter.body for critter in shown}) > b4m.PICTURES // 2
        assert {critter.scene for critter in shown} == set(b4m.LEARNED)


def test_the_base_model_has_seen_shapes_like_all_of_them() -> None:
    assert not any(is_held_out(critter) for critter in b4m.SUBJECTS)
    assert len({part for critter in b4m.SUBJECTS for part in critter.parts().values()}) == 15


def test_prompts_hold_words_that_the_miniature_knows_and_no_style_s_name() -> None:
    tokenizer = WordTokenizer(TEXT_LENGTH)
    told = [
        b4m.style_prompt(b4m.style_critter(style, i)) for style in b4m.STYLES for i in range(b4m.PICTURES)
    ]
    told += [b4m.joint_prompt(scene) for scene in SCENES]
    told += [b4m.example_prompt(run, "night") for run in b4m.RUNS.values()]
    for prompt in told:
        assert not tokenizer.unknown(prompt)
        assert not set(tokenizer.split(prompt)) & {"flat", *b4m.SURFACES}
    assert b4m.joint_prompt("desert") == "a snq critter, in a desert, w@z style"
    assert b4m.style_prompt(b4m.style_critter(1, 0)).endswith(", on a white background, w@z style")
