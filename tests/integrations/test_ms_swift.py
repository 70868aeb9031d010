"""ms-swift's reward class, by its contract (4.6.0, wheel read); the page's example is run."""

import inspect

import numpy as np
import pytest
import torch

from helpers.other_pythons import code_block
from sharpen.errors import InputError
from sharpen.integrations import ms_swift, reward_model
from sharpen.integrations.reward_model import Rating, rate_by

PROMPT = "Numbers: 4 4 6 8 Target: 24\n"
TEXTS = ["8 + 4 = 12 left: 4 6 12\n6 - 4 = 2 left: 2 12\n12 * 2 = 24", "8 * 4 = 32 left: 4 6 32"]
OPTIONS = {"model": "game24", "device": "cpu"}


CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def chatting(scorer, monkeypatch):
    monkeypatch.setattr(scorer.tokenizer, "chat_template", CHAT)
    return scorer.tokenizer


def test_ms_swift_class_is_made_and_called_as_ms_swift_does(swift, scorer):
    made = ms_swift.self_reward(**OPTIONS)
    assert issubclass(made, swift.ORM)
    assert made(args="their arguments").args == "their arguments"
    # compute_rewards_per_func: func(completions, trainer_state=..., **columns of the rows)
    bound = inspect.signature(made.__call__).bind(
        made(),
        TEXTS,
        trainer_state=None,
        messages=[],
        response_token_ids=[],
        prompt_id=[],
        request_id=[],
        finish_reason=[],
        is_truncated=[],
        rollout_infos=[],
        solution=[],
    )
    assert bound.arguments["completions"] == TEXTS


def test_ms_swift_rows_are_rated_in_place(scorer, monkeypatch):
    tokenizer = chatting(scorer, monkeypatch)
    rate = rate_by(Rating(**OPTIONS), scorer)
    other = "Numbers: 1 2 3 4 Target: 24\n"
    order = [(PROMPT, TEXTS[0]), (other, TEXTS[1]), (PROMPT, TEXTS[1])]
    messages = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": t}] for p, t in order
    ]
    texts = [text for _, text in order]
    found = ms_swift.rate_rows(tokenizer, rate, texts, messages)
    wanted = [
        scorer.score(
            [tokenizer(p, add_special_tokens=False)["input_ids"]],
            [[tokenizer(t, add_special_tokens=False)["input_ids"]]],
        )
        .reward("logprob")
        .item()
        for p, t in order
    ]
    assert found == pytest.approx(wanted, abs=1e-4)
    # ids of the rollout are taken as they are: the last turn's, or those of a single turn
    ids = [5, 9, 2]
    kept = ms_swift.rate_rows(tokenizer, rate, texts, messages, [[ids], ids, []])
    assert kept[2] == pytest.approx(wanted[2], abs=1e-4)
    prompt = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    own = scorer.score([prompt], [[ids]]).reward("logprob").item()
    assert kept[0] == pytest.approx(own, abs=1e-4)
    with pytest.raises(InputError, match="one conversation a completion, 3, got 2"):
        ms_swift.rate_rows(tokenizer, rate, texts, messages[:2])


def conversations(texts):
    return [
        [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": text}]
        for text in texts
    ]


def test_ms_swift_a_response_without_a_reward_leaves_the_others_theirs(scorer, monkeypatch, caplog):
    tokenizer = chatting(scorer, monkeypatch)
    rate = rate_by(Rating(**OPTIONS), scorer)
    texts = [TEXTS[0], "", TEXTS[1], ""]
    good = ms_swift.rate_rows(tokenizer, rate, TEXTS, conversations(TEXTS))
    with pytest.raises(InputError, match="set `unscorable_reward` to what such a response"):
        ms_swift.rate_rows(tokenizer, rate, texts, conversations(texts))
    found = ms_swift.rate_rows(
        tokenizer, rate, texts, conversations(texts), unscorable_reward=-50.0
    )
    assert found[::2] == pytest.approx(good, abs=1e-4)
    assert found[1] == found[3] == -50
    # once
    (told,) = (record.getMessage() for record in caplog.records)
    assert "at least one token to be rated, got none); it gets `unscorable_reward`, -50" in told


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple], ids=lambda f: f.__name__)
def test_ms_swift_ids_may_be_arrays(make, scorer, monkeypatch):
    tokenizer = chatting(scorer, monkeypatch)
    rate = rate_by(Rating(**OPTIONS), scorer)
    ids = [5, 9, 2]
    rows = conversations(TEXTS)
    want = ms_swift.rate_rows(tokenizer, rate, TEXTS, rows, [[ids], ids])
    got = ms_swift.rate_rows(tokenizer, rate, TEXTS, rows, [[make(ids)], make(ids)])
    assert got == want
    # an empty one is none, and the text is read
    again = ms_swift.rate_rows(tokenizer, rate, TEXTS, rows, [make([]), [make(ids)]])
    own = ms_swift.rate_rows(tokenizer, rate, TEXTS, rows)
    assert again == pytest.approx([own[0], want[1]], abs=1e-4)


@pytest.mark.parametrize("name", ["images", "videos", "audios"])
@pytest.mark.parametrize("value", [["a.png"], "a.png", object()], ids=["list", "path", "object"])
def test_ms_swift_prompts_that_are_more_than_text_are_refused(name, value, swift):
    made = ms_swift.self_reward(**OPTIONS)()
    with pytest.raises(InputError, match=rf"`{name}`\[1\] must be empty, got .*text alone"):
        made(TEXTS, messages=conversations(TEXTS), **{name: [[], value]})


def test_ms_swift_example_of_the_page(swift, scorer, monkeypatch):
    page = code_block("ms-swift.md")
    assert page.count("Qwen/Qwen2.5-0.5B-Instruct") == 1
    exec(page.replace("Qwen/Qwen2.5-0.5B-Instruct", "game24"), {})
    made = swift.orms["sharpen"](args=None)
    tokenizer = chatting(scorer, monkeypatch)
    monkeypatch.setattr(reward_model, "scorer_of", lambda rating: scorer)
    reward_model.shared_reward_model.cache_clear()
    # the columns of a row, as rl_core/data.py hands them over
    columns = {name: [[], []] for name in ("images", "videos", "audios", "tools", "objects")}
    texts = [TEXTS[0], ""]
    found = made(texts, messages=conversations(texts), response_token_ids=[[], []], **columns)
    ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (PROMPT, TEXTS[0])]
    own = scorer.score([ids[0]], [[ids[1]]]).reward("mean_logprob").item()
    assert found == [pytest.approx(own, abs=1e-4), -20.0]
