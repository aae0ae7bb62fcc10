"""The miniature's tokenizer: a fixed vocabulary, and the end token where transformers looks for it."""

from __future__ import annotations

import hashlib
import warnings

import pytest
import torch

from pit_core.miniature import models
from pit_core.miniature.batches import NEUTRAL
from pit_core.miniature.tokenizer import END, PAD, START, UNKNOWN, WordTokenizer, vocabulary
from pit_core.render import NEGATIVE, PROMPT

KNOWN = "e2ed424bb3bd072c"  # the vocabulary's SHA-256 begins with this


@pytest.fixture(scope="module")
def tokenizer() -> WordTokenizer:
    return WordTokenizer(models.TEXT_LENGTH)


def test_the_vocabulary_is_the_one_that_the_weights_have_learnt() -> None:
    """New words go to the end: the first 164 must stay as they are."""
    words = vocabulary()
    assert hashlib.sha256(" ".join(words[:164]).encode()).hexdigest().startswith(KNOWN)
    assert len(words) == len(set(words)) <= 512


def test_special_tokens_are_where_transformers_looks_for_them(tokenizer: WordTokenizer) -> None:
    """An end token with id 2 means "the highest id" to transformers' CLIP, so ours is another."""
    assert END != 2
    assert [tokenizer.words[i] for i in (PAD, START, UNKNOWN, END)] == [
        "<pad>",
        "<start>",
        "<unknown>",
        "<end>",
    ]
    config = models.build_text_encoder(len(tokenizer)).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (START, END, PAD)
    assert config.vocab_size == len(tokenizer)


def test_transformers_pools_at_the_end_token(tokenizer: WordTokenizer) -> None:
    torch.manual_seed(0)
    encoder = models.build_text_encoder(len(tokenizer)).eval()
    texts = ["a critter", "a thin red round critter with blue cat ears, in a forest, flat style", ""]
    ids = tokenizer(texts)
    with torch.no_grad():
        out = encoder(ids)
        for row, end in enumerate((ids == END).int().argmax(1).tolist()):
            pooled = encoder.text_projection(out.last_hidden_state[row, end])
            assert torch.allclose(out.text_embeds[row], pooled, atol=1e-6)


def test_rows_are_start_words_end_and_padding(tokenizer: WordTokenizer) -> None:
    row = tokenizer(["A red, round critter."])[0]
    words = [tokenizer.words[i] for i in row.tolist()]
    assert words[:8] == ["<start>", "a", "red", ",", "round", "critter", ".", "<end>"]
    assert set(words[8:]) == {"<pad>"} and row.shape == (models.TEXT_LENGTH,)


def test_unknown_words_are_named_in_a_warning(tokenizer: WordTokenizer) -> None:
    with pytest.warns(UserWarning, match="these words: spaceship, zebra$"):
        row = tokenizer(["a zebra in a spaceship, a zebra"])[0]
    assert (row == UNKNOWN).sum() == 3


def test_known_words_warn_of_nothing(tokenizer: WordTokenizer) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer([PROMPT, NEGATIVE, *NEUTRAL, "a w@z toy, paper-cut style"])


def test_the_renderers_default_prompts_were_trained_as_saying_nothing() -> None:
    assert {PROMPT, NEGATIVE, ""} == set(NEUTRAL)


def test_long_texts_are_cut_and_still_end(tokenizer: WordTokenizer) -> None:
    rows = tokenizer(["critter " * 100, "critter " * 38, "critter " * 37])
    assert rows.shape == (3, models.TEXT_LENGTH)
    assert torch.equal(rows[0], rows[1]) and rows[0, -1] == END
    assert rows[2, -2:].tolist() == [END, PAD]
