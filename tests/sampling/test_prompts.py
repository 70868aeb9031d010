import pytest

from sharpen.errors import InputError
from sharpen.experiments.game24.train_base import build_tokenizer
from sharpen.records import PromptRecord
from sharpen.sampling.base import has_chat_template, render

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'left: ' }}{% endif %}"
)
MESSAGES = [{"role": "Numbers", "content": "1 2"}, {"role": "Target", "content": "24"}]


def with_template(template):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_text_gets_the_special_tokens_of_the_tokenizer():
    tokenizer = build_tokenizer()
    prompt = render(PromptRecord("here:1", "p", "Numbers: 1 2"), tokenizer)
    assert prompt.text == "Numbers: 1 2"
    assert prompt.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(prompt.ids[1:]) == "Numbers: 1 2"


def test_messages_go_through_the_chat_template_and_get_nothing_more():
    tokenizer = with_template(TEMPLATE)
    assert has_chat_template(tokenizer)
    prompt = render(PromptRecord("here:1", "p", MESSAGES), tokenizer)
    assert prompt.text == "Numbers: 1 2\nTarget: 24\nleft: "
    assert tokenizer.bos_token_id not in prompt.ids
    assert prompt.ids == tuple(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])


def test_messages_without_a_template_are_refused():
    with pytest.raises(InputError, match=r"here:1: `prompt` holds messages, but .* chat template"):
        render(PromptRecord("here:1", "p", MESSAGES), build_tokenizer())


def test_a_template_that_refuses_is_named():
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match=r"here:1: .* refuses these messages \(roles must alt"):
        render(PromptRecord("here:1", "p", MESSAGES), tokenizer)
