"""Parts to concepts on a whole stack at toy size."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_stack
import torch
from PIL import Image

from pit_core.concepts import (
    Job,
    PriorSettings,
    Stack,
    advice,
    concept_seeds,
    make_concepts,
    make_many,
    picture_seed,
    prepare_parts,
    sample_jobs,
    settings_from,
)
from pit_core.errors import PitError
from pit_core.ip_adapter.encode import ImageEncoder
from pit_core.render import RenderSettings


def _part(colour: str, size: tuple[int, int] = (20, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


PARTS = [_part("red"), _part("navy", (50, 10))]


@pytest.fixture(scope="module")
def stack() -> Stack:
    return tiny_stack.stack()


@pytest.fixture(scope="module")
def with_reference() -> Stack:
    return tiny_stack.stack(use_ref=True)


def _tokens(stack: Stack, *jobs: Job, **settings: Any) -> list[torch.Tensor]:
    return sample_jobs(stack, jobs, PriorSettings(steps=3, **settings))


def test_concepts_are_pictures_with_seeds_and_tokens(stack: Stack) -> None:
    concepts = make_concepts(stack, PARTS, count=3, seed=7, prior_steps=3)
    assert [concept.seed for concept in concepts] == [7, 8, 9]
    for concept in concepts:
        assert (concept.image.mode, concept.image.size) == ("RGB", (32, 32))
        assert concept.tokens.shape == (tiny_stack.TOKENS, tiny_stack.CONTEXT)
        assert concept.tokens.dtype == torch.float32


def test_a_concept_depends_on_its_seed_not_on_the_others(stack: Stack) -> None:
    several = make_concepts(stack, PARTS, count=3, seed=7, prior_steps=3)
    alone = make_concepts(stack, PARTS, count=1, seed=8, prior_steps=3)[0]
    assert tiny_stack.same(several[1].tokens, alone.tokens) < 1e-5
    assert np.abs(np.asarray(several[1].image, int) - np.asarray(alone.image, int)).max() <= 1
    assert tiny_stack.same(several[0].tokens, alone.tokens) > 1e-3


def test_jobs_of_any_length_share_a_run_and_stay_themselves(stack: Stack) -> None:
    jobs = [
        Job(PARTS, [1, 2]),
        Job([*PARTS, *PARTS], [3]),
        Job(PARTS[:1], [4], init=_part("green")),
        Job(PARTS[::-1], [5]),
    ]
    together = _tokens(stack, *jobs)
    assert [len(rows) for rows in together] == [2, 1, 1, 1]
    for job, rows in zip(jobs, together, strict=True):
        assert tiny_stack.same(rows, _tokens(stack, job)[0]) < 1e-5
    made = make_many(stack, jobs, PriorSettings(steps=3))
    assert [[concept.seed for concept in each] for each in made] == [[1, 2], [3], [4], [5]]
    assert tiny_stack.same(made[1][0].tokens, together[1][0]) < 1e-5


def test_the_order_of_the_parts_matters(stack: Stack) -> None:
    first, second = _tokens(stack, Job(PARTS, [1]), Job(PARTS[::-1], [1]))
    assert tiny_stack.same(first, second) > 1e-4


def test_parts_are_sketched_on_demand(stack: Stack) -> None:
    squares = prepare_parts(stack, PARTS, as_sketch=True)
    assert all((np.asarray(square)[..., 0] == np.asarray(square)[..., 2]).all() for square in squares)
    plain, sketched = _tokens(stack, Job(PARTS, [1]), Job(PARTS, [1], as_sketch=True))
    assert tiny_stack.same(plain, sketched) > 1e-4


def test_small_encoders_get_canvases_of_their_own_size(stack: Stack) -> None:
    assert stack.canvas == tiny_stack.PIXELS
    assert prepare_parts(stack, PARTS)[0].size == (tiny_stack.PIXELS, tiny_stack.PIXELS)


def test_a_reference_changes_the_concept(with_reference: Stack) -> None:
    plain, one, four = _tokens(
        with_reference,
        Job(PARTS, [1]),
        Job(PARTS, [1], reference=PARTS[:1]),
        Job(PARTS, [1], reference=PARTS * 2),
    )
    assert tiny_stack.same(plain, one) > 1e-4
    assert tiny_stack.same(one, four) > 1e-4


def test_strength_leads_from_the_initial_concept_to_a_new_one(stack: Stack) -> None:
    start = _part("green", (32, 32))
    tokens = stack.encode([start.resize((32, 32))])[0]
    job = Job(PARTS, [1], init=start)
    distances = [float((_tokens(stack, job, strength=s)[0][0] - tokens).norm()) for s in (0.0, 0.4, 1.0)]
    assert distances[0] < 1e-4
    assert distances[0] < distances[1] < distances[2]
    new = _tokens(stack, Job(PARTS, [1]))[0]
    assert tiny_stack.same(_tokens(stack, job, strength=1.0)[0], new) < 1e-5


def test_an_initial_concept_may_stand_without_parts(stack: Stack) -> None:
    assert _tokens(stack, Job([], [1], init=_part("green")), strength=0.5)[0].shape[0] == 1


def test_progress_names_both_stages_and_can_interrupt(stack: Stack) -> None:
    seen: list[tuple[str, int, int]] = []
    make_concepts(stack, PARTS, count=2, prior_steps=3, steps=2, batch=1, stage=lambda *at: seen.append(at))
    assert seen == [("composing", i, 3) for i in (1, 2, 3)] + [("drawing", i, 4) for i in (1, 2, 3, 4)]

    def stop(*_at: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_concepts(stack, PARTS, count=1, stage=stop)


def test_jobs_that_cannot_run_say_why(stack: Stack) -> None:
    for job, settings, words in [
        (Job([], [1]), {}, "at least one part picture"),
        (Job(PARTS, []), {}, "at least one concept"),
        (Job(PARTS, [1], reference=PARTS), {}, "without a reference slot"),
        (Job(PARTS, [1]), {"strength": 0.5}, "needs an initial concept"),
        (Job([Image.new("RGBA", (9, 9))], [1]), {}, "wholly transparent"),
        (Job([_part("white")], [1], as_sketch=True), {}, "this picture is white"),
    ]:
        with pytest.raises(PitError, match=words):
            _tokens(stack, job, **settings)


def test_models_that_do_not_belong_together_are_refused_in_plain_words(stack: Stack) -> None:
    parts = {name: getattr(stack, name) for name in ("encoder", "adapter", "prior", "prior_info", "renderer")}
    with pytest.raises(
        PitError, match=r"The prior works on 5 tokens of width 32, but 'tiny adapter' makes 4"
    ):
        Stack(**(parts | {"prior": tiny_stack.prior(tokens=5)}))
    with pytest.raises(PitError, match="reads hidden states of width 24"):
        Stack(**(parts | {"encoder": ImageEncoder(tiny_stack.image_encoder(width=32))}))


def test_advice_names_what_the_prior_was_not_trained_for(stack: Stack) -> None:
    assert advice(stack, Job(PARTS, [1])) == []
    assert "trained with up to 3" in advice(stack, Job(PARTS * 2, [1]))[0]
    plain = tiny_stack.stack(sketch_prob=0.0)
    assert "not trained on sketches" in advice(plain, Job(PARTS, [1], as_sketch=True))[0]


def test_seeds_count_up_and_wrap(stack: Stack) -> None:
    assert concept_seeds(2**64 - 1, 2) == [2**64 - 1, 0]
    assert picture_seed(2**64 - 1) < 2**64
    assert len({picture_seed(seed) for seed in range(100)}) == 100
    for seed, count in [(-1, 1), (2**64, 1), (1.5, 1), (0, 0), (0, 10**6), (True, 1)]:
        with pytest.raises(PitError, match="Expected a"):
            concept_seeds(seed, count)


def test_settings_are_changed_one_by_one(stack: Stack) -> None:
    prior, render = settings_from(stack, {"prior_steps": 9, "solver": "heun", "steps": 4, "prompt": None})
    assert prior == PriorSettings(steps=9, solver="heun")
    assert render == replace(tiny_stack.QUICK, steps=4)
    assert settings_from(stack, {}, render=RenderSettings())[1] == RenderSettings()
    with pytest.raises(PitError, match="no setting 'stesp'"):
        settings_from(stack, {"stesp": 4})
    for values in ({"steps": 0}, {"strength": 2.0}, {"solver": "magic"}):
        with pytest.raises(PitError, match="Expected"):
            PriorSettings(**values)
