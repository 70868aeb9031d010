from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.byte_checkpoint import byte_tokenizer
from helpers.server_desk import PROMPT, RIGHT, WRONG, answered, desk, scorer
from sharpen.errors import InputError
from sharpen.models import ModelLimits
from sharpen.server.errors import HTTPError
from sharpen.server.routes import read_score
from sharpen.server.text import Texts

BODY = {"prompt": PROMPT, "completions": [WRONG, RIGHT]}


def test_text_gets_the_bits_of_score_text():
    body = BODY | {"rewards": ["logprob", "neg_entropy"], "token_stats": ["entropy", "topk_id"]}
    found = answered(read_score(body, desk()))
    want = scorer().score_text([PROMPT], [[WRONG, RIGHT]], stats=("logprob", "entropy", "topk_id"))
    assert np.array_equal(found["rewards"]["logprob"], want.reward("logprob"))
    assert np.array_equal(found["rewards"]["neg_entropy"], want.reward("neg_entropy"))
    assert np.array_equal(found["token_stats"]["entropy"], want.tokens.entropy)
    assert np.array_equal(found["token_stats"]["topk_id"], want.tokens.topk_id)
    assert found["offsets"].tolist() == want.offsets.tolist() == [0, 24, 48]
    assert found["n_tokens"].tolist() == [24, 24]
    assert found["errors"] == [None, None]


def test_ids_and_text_mean_the_same():
    tokenizer = scorer().tokenizer
    ids = {
        "prompt": tokenizer.encode(PROMPT),
        "completions": [WRONG, tokenizer.encode(RIGHT, add_special_tokens=False)],
    }
    one, other = (answered(read_score(b, desk()))["rewards"]["logprob"] for b in (BODY, ids))
    assert np.array_equal(one, other)


def test_an_end_of_sequence_is_added_to_text_alone():
    tokenizer = scorer().tokenizer
    ids = tokenizer.encode(RIGHT, add_special_tokens=False)
    body = BODY | {"completions": [RIGHT, ids, [*ids, tokenizer.eos_token_id]], "add_eos": True}
    found = answered(read_score(body, desk()))
    assert found["n_tokens"].tolist() == [25, 24, 25]
    reward = found["rewards"]["logprob"]
    assert reward[0] == reward[2] != reward[1]


def test_no_completions_and_empty_ones_are_ordinary():
    found = answered(read_score(BODY | {"completions": []}, desk()))
    assert found["rewards"]["logprob"].tolist() == []
    found = answered(read_score(BODY | {"completions": [[], RIGHT]}, desk()))
    assert found["n_tokens"].tolist() == [0, 24]
    assert found["rewards"]["logprob"][0] == 0


def test_votes_get_answers_and_validity_from_the_request():
    body = BODY | {
        "completions": [WRONG, RIGHT, RIGHT],
        "rewards": ["majority", "rpc"],
        "answers": ["22", "24", "24"],
        "valid": [True, True, False],
    }
    found = answered(read_score(body, desk()))["rewards"]
    ids = [scorer().tokenizer.encode(x, add_special_tokens=False) for x in (WRONG, RIGHT, RIGHT)]
    scores = scorer().score_text([PROMPT], [[WRONG, RIGHT, RIGHT]], valid=[[True, True, False]])
    answers = body["answers"]
    assert torch.equal(torch.tensor(found["majority"]), scores.reward("majority", answers=answers))
    want = scores.reward("rpc", answers=answers, keys=[tuple(x) for x in ids])
    assert torch.equal(torch.tensor(found["rpc"]), want)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"completions": "x"}, "`completions` must be a list"),
        ({"completions": [RIGHT, 3]}, "`completions[1]` must be text or a list of token ids"),
        ({"completions": [["7"]]}, "completions[0]: token ids must be integers, got '7'"),
        ({"completions": [[True]]}, "completions[0]: token ids must be integers, got True"),
        ({"completions": [[1.5]]}, "completions[0]: token ids must be integers, got 1.5"),
        ({"completions": [[1], [2, 214]]}, "completions[1]: token ids must be in [0, 214)"),
        ({"completions": [[-1]]}, "completions[0]: token ids must be in [0, 214), got -1"),
        ({"completions": [[1] * 5000]}, "completions[0]: prompt and completion must fit"),
        ({"prompt": []}, "at least one token"),
        ({"prompt": None}, "`prompt` must be text or a list of token ids, got None"),
        ({"prompt": "\ud800"}, "half of a surrogate pair at character 0"),
        ({"prompt": [{"role": "user"}]}, "`role` and `content`"),
        ({"prompt": [{"role": "user", "content": "x"}]}, "no chat template"),
        ({"rewards": ["best"]}, "`rewards` must be of logprob, mean_logprob"),
        ({"rewards": ["majority"]}, "the reward majority votes on them"),
        ({"rewards": ["majority"], "answers": ["1"]}, "`answers` must be a list of 2"),
        ({"token_stats": ["logprobs"]}, "`token_stats` must be of logprob, lse"),
        ({"add_eos": 1}, "`add_eos` must be true or false, got 1"),
        ({"valid": [True, 0]}, "`valid[1]` must be true or false, got 0"),
        ({"answers": ["1", 2]}, "`answers[1]` must be text or null, got 2"),
        ({"temperature": 1}, "unknown field `temperature`"),
        ({"\ud800": 1}, "unknown field `\ud800`"),
        ({3: 1}, "unknown field `3`"),
        ({"rewards": [["logprob"]]}, "`rewards` must be of logprob, mean_logprob"),
    ],
)
def test_what_is_wrong_is_told_by_name(change, told):
    with pytest.raises((HTTPError, InputError)) as refused:
        read_score(BODY | change, desk())
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_completion_may_end_one_token_after_the_context_as_in_the_scorer():
    body = {"prompt": [1, 5], "completions": [[7] * 1023]}
    found = answered(read_score(body, desk()))["rewards"]["logprob"]
    assert found == scorer().score([[1, 5]], [[[7] * 1023]]).reward("logprob").numpy()
    with pytest.raises(InputError, match="1024 = 1026"):
        read_score(body | {"completions": [[7] * 1024]}, desk())


@pytest.mark.parametrize("body", [[], "x", None, 3])
def test_a_body_must_be_an_object(body):
    with pytest.raises(HTTPError, match="must be an object"):
        read_score(body, desk())


@pytest.mark.parametrize(
    ("limits", "status", "told"),
    [
        ({"max_n": 1}, 422, "`completions` must hold at most 1, got 2"),
        ({"max_request_tokens": 50}, 413, "at most 50 tokens, prompts and completions together"),
    ],
)
def test_limits_are_told_with_what_was_wanted(limits, status, told):
    with pytest.raises(HTTPError) as refused:
        read_score(BODY, desk(**limits))
    assert refused.value.status == status
    assert told in refused.value.message


def test_limits_that_are_kept_are_not_felt():
    prompt = len(scorer().tokenizer.encode(PROMPT))
    assert read_score(BODY, desk(max_n=2, max_request_tokens=prompt + 48)).jobs
    with pytest.raises(InputError, match="`max_queue` must be at least 1, got 0"):
        desk(max_queue=0)
    with pytest.raises(HTTPError, match="at most 10 bytes, got 11"):
        desk(max_request_bytes=10).limits.check_bytes(11)


def test_a_request_speaks_to_the_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for t in tools or [] %}<{{ t['name'] }}>{% endfor %}{{ messages[0]['content'] }}"
        "{% if add_generation_prompt %}:{% endif %}{{ mood or '' }}"
    )
    at = replace(desk(), texts=Texts(tokenizer), model=ModelLimits(len(tokenizer), None))
    body = {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "completions": ["x"],
        "tools": [{"name": "clock"}],
        "chat_template_kwargs": {"mood": "calm"},
        "documents": None,
    }
    (job,) = read_score(body, at).jobs
    assert tokenizer.decode(job.prompt) == "<clock>hi:calm"
    with pytest.raises(InputError, match="`tools` must be a list, got str"):
        read_score(body | {"tools": "clock"}, at)
