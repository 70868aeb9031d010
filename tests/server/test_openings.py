"""Where the prompt ends in a text that begins with what a host has left of it."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.byte_checkpoint import byte_tokenizer
from helpers.server_desk import PROMPT, RIGHT, answered, desk, scorer
from sharpen.errors import SharpenError
from sharpen.server.routes import read_get_reward
from sharpen.server.text import MIN_KEPT, Texts, kept_end, kept_ids

LONG = "Numbers: 1 2 3 4 Target: 24\n" + PROMPT + "8 + 4 = 12 left: 4 6 12\n"
END = "8 + 4 = 12 left: 4 6 12"
PIECES = st.text("ab", max_size=80)


@given(PIECES, PIECES, PIECES)
def test_the_longest_end_that_the_text_begins_with(before, kept, after):
    opening, text = before + kept, kept + after
    ends = [n for n in range(len(text) + 1) if opening.endswith(text[:n])]
    assert kept_end(opening, text) == (max(ends) if max(ends) >= MIN_KEPT else 0)


def test_texts_that_repeat_themselves_take_time_in_proportion_to_their_length():
    n = 2_000_000
    begun = time.monotonic()
    assert kept_end("a" * n + "b", "a" * n) == 0
    assert kept_end("b" + "a" * n, "a" * n + "c") == n
    # one place after another: most of a minute
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("n_kept", range(13, 28))
def test_a_prompt_that_openrlhf_has_cut_is_what_the_model_has_read(n_kept):
    tokenizer = scorer().tokenizer
    ids, response = (tokenizer.encode(x, add_special_tokens=False) for x in (LONG, RIGHT))
    # as its source has it: the last tokens of the prompt, decoded with what was generated
    query = tokenizer.decode(ids[-n_kept:] + response, skip_special_tokens=False)
    asked = read_get_reward({"query": [query], "prompts": [LONG]}, desk())
    (job,) = asked.jobs
    assert (list(job.prompt), [list(c) for c in job.completions]) == (ids[-n_kept:], [response])
    want = scorer().score([ids[-n_kept:]], [[response]]).reward("logprob").tolist()
    assert answered(asked)["rewards"] == pytest.approx(want, abs=1e-4)


def test_a_prompt_that_is_cut_through_a_character():
    tokenizer = byte_tokenizer()
    texts = Texts(tokenizer)
    prompt = "Wie heißt das Zeichen \N{GRINNING FACE}, und was bedeutet 漢字 auf Deutsch? "
    ids = tokenizer.encode(prompt)
    response = tokenizer.encode("Lächeln")
    for n_kept in range(MIN_KEPT + 8, len(ids)):
        query = tokenizer.decode(ids[-n_kept:] + response)
        assert texts.split(query, prompt, "query") == (ids[-n_kept:], response)


def test_the_whole_prompt_comes_before_any_end_of_it():
    prompt = PROMPT * 3
    (job,) = read_get_reward({"query": [prompt + END], "prompts": [prompt]}, desk()).jobs
    assert list(job.prompt) == scorer().tokenizer.encode(prompt, add_special_tokens=False)


def test_an_end_that_no_tokens_spell_is_tokenised_again():
    texts = Texts(byte_tokenizer())
    assert kept_ids([3, 4, 5], "no such text", texts.decoded) is None
    loose = LONG.replace("Target:", "Target: ")
    query = loose[20:] + END
    (job,) = read_get_reward({"query": [query], "prompts": [loose]}, desk()).jobs
    assert list(job.prompt) == scorer().tokenizer.encode(loose[20:], add_special_tokens=False)


@pytest.mark.parametrize(
    "query",
    [
        "4\n" + END,  # the end of every prompt
        LONG[-MIN_KEPT + 1 :] + END,
        LONG[5:60] + END,  # the middle of it
        "\ufffd" * 4 + LONG[-40:] + END,  # no character has so many bytes
        "",
    ],
)
def test_what_is_no_end_of_the_prompt_or_a_short_one_is_refused(query):
    with pytest.raises(SharpenError, match=r"`query\[0\]` must begin with its prompt 'Numbers: 1"):
        read_get_reward({"query": [query], "prompts": [LONG]}, desk())


def test_a_prompt_far_longer_than_the_context_is_read_at_its_end_alone():
    texts = Texts(scorer().tokenizer, max_chars=200)
    prompt = "Numbers: 1 2 3 4 Target: 24\n" * 1000 + PROMPT
    tail = prompt[-60:]
    want = [scorer().tokenizer.encode(x, add_special_tokens=False) for x in (tail, END)]
    assert texts.split(tail + END, prompt, "query") == tuple(want)
    with pytest.raises(SharpenError, match="`query` must have at most 200 characters, got 9"):
        texts.split(tail + "8 " * 4500, prompt, "query")
