"""`sharpen.text`: what a model reads is what a person wrote, for every kind of tokenizer."""

import logging

import pytest

from sharpen.text import CONTEXT, MAX_CONTEXT_CHARS, TextCodec

from .helpers.tokenizers import BOS, EOS, KINDS, bytes_of_text, llama, pieces

PROMPTS = ["Q\n", "Q: 8", "Q: 8 x =", "", "a", "2+2=", "Q: 8\n\n"]
COMPLETIONS = ["8", " 8", "x + 8", " x", "\n8", "4", "+", "\u00e9", "== 8."]
EXACT = [kind for kind in KINDS if "word" not in kind and kind != "pieces, no bytes"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_what_the_whole_text_has_after_the_prompt(kind, prompt):
    codec = TextCodec(KINDS[kind]())
    before = codec.prompt_ids(prompt)
    found = codec.completion_ids(prompt, COMPLETIONS)
    for completion, ids in zip(COMPLETIONS, found, strict=True):
        whole = codec.prompt_ids(prompt + completion)
        if whole[: len(before)] == before:
            assert ids == whole[len(before) :], completion


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_of_a_completion_spell_its_text(kind, prompt):
    codec = TextCodec(KINDS[kind]())
    before = codec.prompt_ids(prompt)
    found = codec.completion_ids(prompt, COMPLETIONS)
    # a text of nothing before it begins with the space that decoding takes off
    if codec.decode(before):
        assert codec.completion_texts(before, found) == COMPLETIONS


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("prompt", [x for x in PROMPTS if x])
def test_text_and_ids_of_a_prompt_say_the_same(kind, prompt):
    codec = TextCodec(KINDS[kind]())
    by_ids = codec.completion_ids(codec.prompt_ids(prompt), COMPLETIONS)
    assert by_ids == codec.completion_ids(prompt, COMPLETIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_bos_stands_once_and_no_eos_behind_a_prompt(kind):
    tokenizer = KINDS[kind]()
    codec = TextCodec(tokenizer)
    for text in ("Q: 8", f"{BOS}Q: 8"):
        ids = codec.prompt_ids(text)
        has_bos = "BOS" in kind or "both" in kind or kind in ("words", "word pieces")
        has_bos |= kind in ("pieces, unspaced", "pieces, no bytes", "bytes, spaced")
        assert sum(token == tokenizer.bos_token_id for token in ids) == int(has_bos or BOS in text)
        assert tokenizer.eos_token_id not in ids


def test_numbers_by_hand_of_a_space_that_is_not_there():
    tokenizer = llama()
    codec = TextCodec(tokenizer)
    (inside,) = codec.completion_ids("Q\n", ["8"])
    assert tokenizer.convert_ids_to_tokens(inside) == ["8"]
    (spaced,) = codec.completion_ids("Q\n", [" 8"])
    assert tokenizer.convert_ids_to_tokens(spaced) == ["\u25818"]
    assert codec.completion_texts(codec.prompt_ids("Q\n"), [inside, spaced]) == ["8", " 8"]


def test_what_merges_with_its_prompt_is_encoded_apart_and_said_once(caplog):
    tokenizer = bytes_of_text()
    codec = TextCodec(tokenizer)
    found = codec.completion_ids("a ", ["x", "8", "c"])
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in found] == [["x"], ["8"], ["c"]]
    assert codec.n_merged == 2
    with caplog.at_level(logging.WARNING):
        codec.warn_merged()
        codec.warn_merged()
    assert len(caplog.records) == 1
    assert caplog.text.count("2 completions") == 1


def test_special_tokens_in_a_completion_are_read():
    for tokenizer in (bytes_of_text(), pieces()):
        codec = TextCodec(tokenizer)
        (ids,) = codec.completion_ids("Q\n", [f"8{EOS}"])
        assert tokenizer.convert_ids_to_tokens(ids) == ["8", EOS]
        # also where the start merges
        (ids,) = codec.completion_ids("a ", [f"x{EOS}"])
        assert tokenizer.convert_ids_to_tokens(ids) == ["x", EOS]


def test_a_character_that_begins_in_the_prompt_belongs_to_the_completion():
    tokenizer = bytes_of_text()
    codec = TextCodec(tokenizer)
    first, second = codec.encode("\u00e9")
    assert codec.completion_texts([*codec.encode("a"), first], [[second]]) == ["\u00e9"]


def test_prompts_that_end_with_special_tokens_alone_keep_the_space():
    codec = TextCodec(pieces())
    end = codec.tokenizer.eos_token_id
    before = [*codec.prompt_ids("Q"), *[end] * (CONTEXT + 3)]
    x = codec.tokenizer.get_vocab()["\u2581x"]
    assert codec.completion_texts(before, [[x]]) == [" x"]


@pytest.mark.parametrize("kind", EXACT)
def test_a_long_prompt_gives_the_same_ids_as_its_end(kind):
    codec = TextCodec(KINDS[kind]())
    line = "Q: 8 x = 2+2\n"
    prompt = line * (3 * MAX_CONTEXT_CHARS // len(line)) + "Q: "
    before = codec.prompt_ids(prompt)
    for completion, ids in zip(COMPLETIONS, codec.completion_ids(prompt, COMPLETIONS), strict=True):
        whole = codec.prompt_ids(prompt + completion)
        if whole[: len(before)] == before:
            assert ids == whole[len(before) :]
