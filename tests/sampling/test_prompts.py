import json

import numpy as np
import pytest

from helpers.byte_checkpoint import byte_tokenizer
from sharpen.errors import InputError, RecordError
from sharpen.experiments.game24.train_base import build_tokenizer
from sharpen.records import (
    PromptRecord,
    check_prompt,
    content_id,
    read_prompts,
    template_fields,
)
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


RICH = (
    "{% for t in tools or [] %}<{{ t['function']['name'] }}>{% endfor %}"
    "{% for d in documents or [] %}({{ d['title'] }}){% endfor %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] or m['tool_calls'][0]['name'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}<nothink>{% endif %}"
)
USER = {"role": "user", "content": "hi"}


def rendered(row, tokenizer=None):
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    tokenizer.chat_template = RICH
    prompt = check_prompt("here:1", row)
    record = PromptRecord("here:1", "p", prompt, template_fields("here:1", row))
    return render(record, tokenizer).text


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"tools": [{"function": {"name": "clock"}}]}, "<clock>[user]hi\n[assistant]"),
        ({"documents": [{"title": "d", "text": "x"}]}, "(d)[user]hi\n[assistant]"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            "[user]hi\n[assistant]<nothink>",
        ),
        ({"tools": None, "chat_template_kwargs": None}, "[user]hi\n[assistant]"),
    ],
)
def test_a_record_speaks_to_its_template(more, text):
    assert rendered({"prompt": [USER], **more}) == text


def test_an_answer_that_is_begun_is_continued():
    begun = {"role": "assistant", "content": "The answer is"}
    assert rendered({"prompt": [USER, begun]}) == "[user]hi\n[assistant]The answer is"


def test_content_may_be_parts_of_text_arrays_or_null_beside_calls():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    want = rendered({"prompt": [USER]})
    assert rendered({"prompt": [{"role": "user", "content": parts}]}) == want
    arrays = {"role": "user", "content": np.array(parts, dtype=object)}
    assert rendered({"prompt": [arrays]}) == want
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    answer = {"role": "tool", "content": "12"}
    assert rendered({"prompt": [USER, call, answer]}) == (
        "[user]hi\n[assistant]clock\n[tool]12\n[assistant]"
    )


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, "'image'"),
        ({"prompt": [{"role": "user", "content": ["hi"]}]}, "'str'"),
        ({"prompt": [{"role": "assistant", "content": None}]}, "`content` must be text, got None"),
        ({"prompt": [USER], "tools": "clock"}, "`tools` must be a list, got str"),
        ({"prompt": [USER], "chat_template_kwargs": []}, "must be an object, got list"),
        (
            {"prompt": [USER], "chat_template_kwargs": {"add_generation_prompt": False}},
            "leave `add_generation_prompt` to sharpen",
        ),
    ],
)
def test_what_a_template_cannot_have_is_named(row, told):
    with pytest.raises(RecordError, match=r"here:1: ") as refused:
        rendered(row)
    assert told in str(refused.value)


def test_records_that_differ_to_their_template_have_names_of_their_own(tmp_path):
    path = tmp_path / "prompts.jsonl"
    thinking = [{}, {"chat_template_kwargs": {"enable_thinking": False}}, {"tools": None}]
    path.write_text("".join(json.dumps({"prompt": [USER], **more}) + "\n" for more in thinking))
    plain, quiet, same = read_prompts(path)
    assert plain.id == content_id([USER])
    assert quiet.id != plain.id
    assert same.id == f"{plain.id}-2"
