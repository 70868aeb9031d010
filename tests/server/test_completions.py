from dataclasses import replace

import pytest
import torch

from helpers.byte_checkpoint import byte_tokenizer
from helpers.server_desk import PROMPT, RIGHT, answered, desk, scorer
from sharpen.errors import SharpenError
from sharpen.models import ModelLimits
from sharpen.server.routes import CompletionsRequest, read_completions
from sharpen.server.text import Texts
from sharpen_kernels import TokenStats

# what lm-eval's local-completions sends
ASKED = {
    "model": "game24",
    "prompt": [[1, 5, 9, 7], [1, 5]],
    "temperature": 0,
    "max_tokens": 1,
    "logprobs": 1,
    "seed": 1234,
    "echo": True,
}


def read(body, **limits):
    return read_completions(body, desk(**limits), created=7)


def choices(change):
    return answered(read(ASKED | change))["choices"]


def logits(ids):
    with torch.no_grad():
        return scorer().model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_every_given_token_and_one_greedy_one_have_their_log_probs():
    for choice, ids in zip(choices({}), ASKED["prompt"], strict=True):
        found, rows = choice["logprobs"], logits(ids)
        following = int(rows[-1].argmax())
        assert choice["finish_reason"] == "length"
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        want = [rows[i, token].item() for i, token in enumerate([*ids[1:], following])]
        assert found["token_logprobs"][1:] == pytest.approx(want, abs=1e-5)
        best = [max(top.values()) for top in found["top_logprobs"][1:]]
        assert best == pytest.approx(rows.amax(1).tolist(), abs=1e-5)
        # equality is how a client sees that a token is greedy
        greedy = [own == top for own, top in zip(found["token_logprobs"][1:], best, strict=True)]
        assert greedy == [*(rows[:-1].argmax(1) == torch.tensor(ids[1:])).tolist(), True]


@pytest.mark.parametrize(
    "prompt", [PROMPT, [PROMPT], scorer().tokenizer.encode(PROMPT)], ids=["text", "texts", "ids"]
)
def test_a_prompt_may_have_every_form(prompt):
    (choice,) = choices({"prompt": prompt, "max_tokens": 0})
    want = scorer().tokenizer.encode(PROMPT)
    rows = logits(want[:-1])
    found = choice["logprobs"]["token_logprobs"][1:]
    assert found == pytest.approx([rows[i, t].item() for i, t in enumerate(want[1:])], abs=1e-5)


def test_text_offsets_point_into_the_text():
    line = RIGHT.splitlines()[0]
    (choice,) = choices({"prompt": line})
    found = choice["logprobs"]
    assert choice["text"].startswith(line)
    pairs = list(zip(found["tokens"], found["text_offset"], strict=True))
    for token, offset in pairs[2:]:
        assert choice["text"].startswith(token, offset)
    # the special token before the text is no part of it
    assert pairs[0] == (" <s>", 0)
    assert pairs[1][1] == 0


def test_without_echo_there_is_the_greedy_token_alone():
    (choice,) = choices({"prompt": [1, 5, 9, 7], "echo": False, "logprobs": 0})
    rows = logits([1, 5, 9, 7])
    assert choice["logprobs"]["token_logprobs"] == pytest.approx([rows[-1].max().item()], abs=1e-5)
    assert len(choice["logprobs"]["top_logprobs"][0]) == 1
    assert choice["text"] == choice["logprobs"]["tokens"][0]


def test_without_log_probs_nothing_is_scored():
    asked = read(ASKED | {"logprobs": None, "max_tokens": 0, "prompt": PROMPT})
    assert asked.jobs == []
    (choice,) = asked.answer([])["choices"]
    assert choice["logprobs"] is None
    assert choice["text"] == PROMPT


def test_k_tokens_and_the_one_that_stands_there():
    (choice,) = choices({"prompt": [1, 5, 9], "logprobs": 3, "return_tokens_as_token_ids": True})
    rows = logits([1, 5, 9])
    for i, token in enumerate([5, 9]):
        best = rows[i].topk(3)
        want = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        want[token] = rows[i, token].item()
        found = choice["logprobs"]["top_logprobs"][i + 1]
        assert found == pytest.approx({f"token_id:{t}": x for t, x in want.items()}, abs=1e-5)


def test_a_greedy_token_has_one_log_prob_also_where_two_sums_differ_in_their_last_bit():
    asked = read(ASKED | {"prompt": [1, 5], "max_tokens": 0})
    own, other = -0.5, -0.49999997
    tokens = TokenStats(
        logprob=torch.tensor([own]), topk=torch.tensor([[other]]), topk_id=torch.tensor([[5]])
    )
    (choice,) = asked.answer([tokens])["choices"]
    found = choice["logprobs"]
    assert found["token_logprobs"] == [None, own]
    assert list(found["top_logprobs"][1].values()) == [own]


def test_a_model_without_a_tokenizer_names_tokens_by_id():
    at = desk()
    object.__setattr__(at, "texts", Texts(None))
    (choice,) = answered(read_completions(ASKED | {"prompt": [1, 5]}, at, 7))["choices"]
    assert choice["logprobs"]["tokens"][:2] == ["token_id:1", "token_id:5"]
    with pytest.raises(SharpenError, match="no tokenizer here; send token ids"):
        read_completions(ASKED | {"prompt": "text"}, at, 7)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"max_tokens": 2}, "`max_tokens` must be a whole number from 0 to 1, got 2"),
        ({"max_tokens": None}, "does not generate"),
        ({"max_tokens": 0, "echo": False}, "does not generate"),
        ({"temperature": 1.0}, "`temperature` must be 0"),
        ({"n": 2}, "`n` is not supported"),
        ({"stream": True}, "`stream` is not supported"),
        ({"top_k": 5}, "`top_k` is not supported"),
        ({"repetition_penalty": 1.2}, "`repetition_penalty` is not supported"),
        ({"skip_special_tokens": False}, "`skip_special_tokens` is not supported"),
        ({"prompt_logprobs": 1}, "unknown field `prompt_logprobs`"),
        ({"logprobs": 21}, "`logprobs` must be a whole number from 0 to 20"),
        ({"logprobs": True}, "`logprobs` must be a whole number"),
        ({"model": "gpt-4"}, "`model` must be 'game24', got 'gpt-4'"),
        ({"prompt": []}, "an empty list"),
        ({"prompt": None}, "`prompt` must be text"),
        ({"prompt": [[1], []]}, "prompt[1]: the prompt must hold at least one token"),
        ({"prompt": [[1, 999]]}, "prompt[0]: token ids must be in [0, 214), got 999 at position 1"),
        ({"prompt": [[1] * 1025]}, "1025 + 1 = 1026"),
        ({"prompt": [[1] * 1026], "max_tokens": 0}, "1026 + 0 = 1026"),
        ({"messages": []}, "unknown field `messages`"),
    ],
)
def test_what_is_not_supported_is_told_by_name(change, told):
    with pytest.raises(SharpenError) as refused:
        read(ASKED | change)
    assert told in str(refused.value)


def test_a_whole_context_has_a_greedy_token_after_it():
    ids = [1, 5, 9, 7] * 256
    (choice,) = choices({"prompt": [ids]})
    rows = logits(ids)
    found = choice["logprobs"]["token_logprobs"]
    assert len(found) == 1024 + 1
    assert found[-1] == pytest.approx(rows[-1].max().item(), abs=1e-4)
    # and the last token that is only predicted is read off one more
    (choice,) = choices({"prompt": [[*ids, 7]], "max_tokens": 0})
    assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(rows[-1, 7].item(), abs=1e-4)


def test_what_a_client_says_it_does_not_want_is_no_error():
    off = {"n": 1, "best_of": 1, "stream": False, "stop": None, "top_p": 1.0, "user": "me"}
    assert read(ASKED | off).jobs


NEUTRAL = {
    "stop": "\n",
    "stop_token_ids": [],
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "min_tokens": 0,
    "ignore_eos": False,
    "use_beam_search": False,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "prompt_logprobs": None,
}


@pytest.mark.parametrize("field", NEUTRAL)
def test_what_clients_always_send_changes_nothing(field):
    assert [*choices({field: NEUTRAL[field]})] == [*choices({})]


@pytest.mark.parametrize("field", sorted(set(CompletionsRequest.model_fields) - {"prompt"}))
def test_null_is_what_a_client_leaves_open(field):
    without = {key: value for key, value in ASKED.items() if key != field}
    if field == "max_tokens":
        with pytest.raises(SharpenError, match="does not generate"):
            read(ASKED | {field: None})
        return
    jobs = read_completions(without, desk(), 7).jobs
    assert read(ASKED | {field: None}).jobs[0].completions == jobs[0].completions


@pytest.mark.parametrize(
    "change", [{"top_p": 0.5}, {"top_k": 5}, {"presence_penalty": 1}, {"repetition_penalty": 2}]
)
def test_without_a_token_to_come_options_of_sampling_are_idle(change):
    idle = {"max_tokens": 0, "temperature": 1.0}
    assert [*choices(idle | change)] == [*choices(idle)]
    with pytest.raises(SharpenError, match="is not supported"):
        read(ASKED | change)


def test_offsets_where_a_character_is_several_tokens():
    tokenizer = byte_tokenizer()
    at = replace(desk(), texts=Texts(tokenizer), model=ModelLimits(len(tokenizer), None))
    for text in ("abc \u00e9 xyz", "\u6f22 a\U0001f600b"):
        asked = read_completions(
            {"prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}, at, 7
        )
        (job,) = asked.jobs
        logprob = torch.zeros(len(job.completions[0]))
        near = torch.zeros(len(logprob), 1)
        tokens = TokenStats(logprob=logprob, topk=near, topk_id=near.long())
        (found,) = asked.answer([tokens])["choices"]
        places = zip(found["logprobs"]["tokens"], found["logprobs"]["text_offset"], strict=True)
        plain = [(token, offset) for token, offset in places if token.isascii() and token != " "]
        assert plain == [(x, text.index(x)) for x in text if x.isascii() and x != " "]
