"""`sharpen.text`: what a model reads is what a person wrote, for every kind of tokenizer."""

import logging
from itertools import accumulate

import pytest

from helpers.tokenizers import BOS, EOS, KINDS, PAD, bytes_of_text, llama, pieces
from sharpen.errors import InputError
from sharpen.text import CONTEXT, MAX_CONTEXT_CHARS, REPLACEMENT, TextCodec

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


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("n", range(1, 13))
def test_a_prompt_of_characters_of_several_tokens_keeps_them_to_itself(kind, n):
    codec = TextCodec(KINDS[kind]())
    # its last tokens, which are decoded with the completion, may begin inside a character
    prompt = "Q" + "\u6f22\u5b57" * n + "x" * (n % 3)
    before = codec.prompt_ids(prompt)
    found = codec.completion_ids(prompt, ["\u6f22 8", "8"])
    assert codec.completion_texts(before, found) == ["\u6f22 8", "8"]


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


def test_an_ended_completion_gets_its_end_once():
    codec = TextCodec(bytes_of_text())
    eos = codec.ends.eos
    found = codec.completion_ids("Q\n", ["8", f"8{EOS}", "8"], is_ended=[True, True, False])
    assert [ids[-1] == eos for ids in found] == [True, True, False]
    assert found[0] == found[1] == [*found[2], eos]
    assert codec.completion_ids("Q\n", ["8"], is_ended=True) == [found[0]]


def test_a_tokenizer_without_an_end_is_refused_only_where_one_is_needed():
    tokenizer = bytes_of_text()
    tokenizer.eos_token = None
    codec = TextCodec(tokenizer)
    assert codec.completion_ids("Q\n", ["8"], is_ended=True) == [codec.encode("8")]
    with pytest.raises(InputError, match="needs a tokenizer with one EOS token, got None"):
        codec.check_has_end()


@pytest.mark.parametrize("n", [1, 2, 20])
def test_padding_around_a_text_is_no_part_of_it(n):
    codec = TextCodec(bytes_of_text())
    assert codec.without_padding(PAD * n + f"Q 8{EOS}" + PAD * n) == f"Q 8{EOS}"
    assert codec.without_padding(f"Q{PAD}8") == f"Q{PAD}8"


@pytest.mark.parametrize("n", [1, 2, 20])
def test_padding_that_is_the_end_stays_once_behind_a_text(n):
    tokenizer = bytes_of_text()
    tokenizer.pad_token = EOS
    assert TextCodec(tokenizer).without_padding("Q 8" + EOS * n) == f"Q 8{EOS}"
    tokenizer.pad_token = None
    assert TextCodec(tokenizer).without_padding("Q 8" + EOS * n) == "Q 8" + EOS * n


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("text", ["Q: 8 x", "Q \u00e9 8", "\u6f22\u5b57 x", "a\U0001f600b", ""])
def test_ends_of_tokens_in_a_text_are_where_they_stand(kind, text):
    codec = TextCodec(KINDS[kind]())
    ids = codec.encode(text)
    ends = codec.character_ends(ids)
    whole = codec.decode(ids, keep_special=True)
    assert not ids or ends[-1] == len(whole)
    # the whole characters that are decoded up to here; a byte-fallback decoder gives up those of a
    # run of bytes whose last character is not whole
    upto = [codec.decode(ids[:k], keep_special=True) for k in range(1, len(ids) + 1)]
    assert ends == list(accumulate((len(x.rstrip(REPLACEMENT)) for x in upto), max))
