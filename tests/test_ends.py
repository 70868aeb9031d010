"""`sharpen.ends`: which tokens end a completion, for the templates and configs that models have."""

import pytest
from transformers import GenerationConfig

from helpers.tokenizers import bytes_of_text, llama
from sharpen.ends import Ends, is_natural

TURN = "<turn>"
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# GLM's: a turn ends where the next one begins
OPEN_ENDED = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_tokenizer(template: str | None, *special: str):
    tokenizer = bytes_of_text()
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def test_without_a_template_the_tokenizers_eos_is_the_end():
    ends = Ends.of(llama())
    assert ends.stops == (2,)
    assert ends.after("anything") == 2


def test_no_tokenizer_and_no_config_have_no_end():
    assert Ends.of(None).stops == ()
    assert Ends.of(None).after("anything") is None


@pytest.mark.parametrize("declared", [7, [7], [7, 2]])
def test_a_sampler_stops_at_every_end_that_anyone_names(declared):
    tokenizer = chat_tokenizer(CHAT, TURN)
    turn = tokenizer.get_vocab()[TURN]
    ends = Ends.of(tokenizer, GenerationConfig(eos_token_id=declared))
    assert sorted(ends.stops) == sorted({7, 2, turn})


def test_an_answer_ends_with_its_turn_and_other_text_with_eos():
    tokenizer = chat_tokenizer(CHAT, TURN)
    ends = Ends.of(tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert ends.after(str(prompt)) == tokenizer.convert_tokens_to_ids(TURN)
    assert ends.after("Q: hi\nA:") == tokenizer.eos_token_id


@pytest.mark.parametrize("is_declared", [True, False])
def test_the_next_turn_ends_an_answer_only_where_the_model_stops_there(is_declared):
    tokenizer = chat_tokenizer(OPEN_ENDED, "<user>", "<assistant>")
    user = tokenizer.convert_tokens_to_ids("<user>")
    config = GenerationConfig(eos_token_id=[user] if is_declared else None)
    ends = Ends.of(tokenizer, config)
    end = user if is_declared else tokenizer.eos_token_id
    assert ends.after("<user>hi<assistant>") == end


def test_a_template_that_refuses_the_probe_is_no_error():
    ends = Ends.of(chat_tokenizer("{{ raise_exception('system first') }}"))
    assert (ends.turn_end, ends.opening) == (None, "")


def test_words_behind_an_answer_are_no_end():
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert Ends.of(chat_tokenizer(template)).turn_end is None


@pytest.mark.parametrize("reason", ["stop", "eos", "eos_token", "stop_sequence", "STOP"])
def test_reasons_of_a_natural_end(reason):
    assert is_natural(reason)


@pytest.mark.parametrize("reason", ["length", "max_tokens", "abort", "content_filter", None, 1])
def test_other_reasons(reason):
    assert not is_natural(reason)
