"""Samples of a completions endpoint: whole, in order, resumable, honest about what is unknown."""

import logging

import pytest

from helpers.completions_server import serving
from sharpen.errors import InputError
from sharpen.sampling import Prompt, Sampler, SamplingConfig
from sharpen.sampling.endpoint import EndpointClient, EndpointError, EndpointSampler, Patience

PROMPTS = [Prompt(f"p{i}", f"question {i}", (), f"file:{i}") for i in range(6)]
FOUR = SamplingConfig(n=4, max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)


def sampler(url, **options):
    # an unlucky test shall fail in seconds
    return EndpointSampler(
        EndpointClient(url, patience=Patience(timeout_s=5.0, tries=2, max_wait_s=0.01)),
        "instruct",
        **options,
    )


def by_id(parts):
    return {samples.prompt_id: samples for part in parts for samples in part}


def keep(kept, parts):
    for part in parts:
        kept += [samples.prompt_id for samples in part]


def test_it_is_a_sampler():
    with serving() as (url, _):
        assert isinstance(sampler(url), Sampler)


def test_a_prompt_is_one_request_and_its_choices_come_in_order():
    with serving() as (url, server):
        found = by_id(sampler(url).sample(PROMPTS, FOUR))
    assert sorted(found) == [prompt.id for prompt in PROMPTS]
    assert len(server.asked) == 6
    asked = {body["prompt"]: body for body in server.asked}["question 2"]
    seed = asked["seed"]
    assert asked == {
        "route": "/v1/completions",
        "model": "instruct",
        "prompt": "question 2",
        "n": 4,
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "logprobs": 0,
        "seed": seed,
    }
    assert 0 <= seed < 2**31
    assert len({body["seed"] for body in server.asked}) == 6
    samples = found["p2"]
    assert samples.completions == [f"{seed} + {i}" for i in range(4)]
    assert samples.tokens == [[str(seed), "+", str(i)] for i in range(4)]
    assert samples.logprobs == [[-1.0, -0.5, -0.25 * (i + 1)] for i in range(4)]
    assert samples.finish_reasons == ["stop", "length", "stop", "length"]
    # nobody here knows the ids
    assert samples.completion_ids == []
    assert samples.served_model == "instruct-0914"


def test_the_same_run_asks_the_same_and_another_seed_asks_otherwise():
    seeds = []
    with serving() as (url, server):
        for seed in (3, 3, 4):
            server.asked.clear()
            list(sampler(url).sample(PROMPTS, SamplingConfig(n=2, seed=seed)))
            seeds.append({body["prompt"]: body["seed"] for body in server.asked})
    assert seeds[0] == seeds[1]
    assert not set(seeds[0].values()) & set(seeds[2].values())


def test_finished_prompts_are_not_asked_for_again():
    with serving() as (url, server):
        found = by_id(sampler(url).sample(PROMPTS, FOUR, done={"p0", "p3", "p5"}))
    assert sorted(found) == ["p1", "p2", "p4"]
    assert len(server.asked) == 3


def test_fewer_choices_are_told_and_the_rest_is_asked_for_again(caplog):
    with serving() as (url, server), caplog.at_level(logging.WARNING):
        server.most = 3
        samples = by_id(sampler(url).sample(PROMPTS[:2], SamplingConfig(n=8)))["p0"]
    asked = [body for body in server.asked if body["prompt"] == "question 0"]
    assert [body["n"] for body in asked] == [8, 5, 2]
    assert len({body["seed"] for body in asked}) == 3
    assert len(samples.completions) == len(set(samples.completions)) == 8
    assert caplog.text.count("it gave 3 completions where 8 were asked for") == 1


def test_a_limit_of_choices_splits_requests():
    with serving() as (url, server):
        samples = by_id(sampler(url, choices=3).sample(PROMPTS[:1], SamplingConfig(n=7)))["p0"]
    assert [body["n"] for body in server.asked] == [3, 3, 1]
    assert len(set(samples.completions)) == 7


def test_more_choices_than_asked_for_are_dropped():
    with serving() as (url, server):
        server.answer = lambda body: {"choices": [server.choice(body, i) for i in range(9)]}
        samples = by_id(sampler(url).sample(PROMPTS[:1], FOUR))["p0"]
    assert [len(samples.completions), samples.served_model] == [4, "instruct"]


def test_so_many_run_at_a_time_and_no_more():
    with serving() as (url, server):
        server.hold_s = 0.05
        list(sampler(url, concurrency=3).sample(PROMPTS, FOUR))
    assert server.peak == 3


def without_logprobs(choice, body):
    return choice | {"logprobs": None}


def test_a_server_that_takes_0_for_none_is_asked_for_1():
    with serving() as (url, server):
        server.change = lambda c, body: c if body["logprobs"] else without_logprobs(c, body)
        found = by_id(sampler(url, concurrency=1).sample(PROMPTS, FOUR))
    assert len(found) == 6
    assert [body["logprobs"] for body in server.asked] == [0, 1, 1, 1, 1, 1, 1]
    # the same request, not another draw
    assert server.asked[0]["seed"] == server.asked[1]["seed"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_logprobs, "must give the log-prob of each token (`logprobs`), got none"),
        (lambda c, _: {"index": 0, "message": {}}, "chat completions have no log-probs"),
        (lambda c, _: c | {"text": None}, "must hold a `text` in each choice"),
        (
            lambda c, _: c | {"logprobs": {"tokens": ["a"], "token_logprobs": [-1.0, -2.0]}},
            "as many `tokens` as `token_logprobs`, 2",
        ),
        (
            lambda c, _: c | {"logprobs": {"tokens": ["a"], "token_logprobs": ["-1"]}},
            "numbers in `token_logprobs`",
        ),
        (lambda c, _: "text", "must hold `choices`, a list of objects"),
    ],
)
def test_an_answer_that_is_not_one_is_told(change, message):
    with serving() as (url, server):
        server.change = change
        server.answer = lambda body: {"choices": [server.choice(body, 0)]}
        with pytest.raises(EndpointError) as told:
            list(sampler(url).sample(PROMPTS, FOUR))
    assert message in str(told.value)
    # not each prompt runs into the same wall
    assert not told.value.of_request


def test_no_choices_at_all_are_told():
    with serving() as (url, server):
        server.answer = lambda body: {"choices": []}
        with pytest.raises(EndpointError, match="must give 4 completions, got none"):
            list(sampler(url).sample(PROMPTS, FOUR))


def test_unknown_ends_and_missing_numbers_never_win():
    def odd(choice, body):
        if choice["index"] == 0:
            return choice | {"finish_reason": "content_filter"}
        if choice["index"] == 1:
            choice["logprobs"]["token_logprobs"][1] = None
        return choice

    with serving() as (url, server):
        server.change = odd
        samples = by_id(sampler(url).sample(PROMPTS[:1], FOUR))["p0"]
    assert samples.finish_reasons == ["cut", "nan", "stop", "length"]
    assert samples.logprobs[1][1] != samples.logprobs[1][1]


def test_a_refused_prompt_does_not_stop_the_others():
    with serving() as (url, server):
        server.refuse = lambda body: 400 if body["prompt"] in ("question 1", "question 4") else None
        kept = []
        with pytest.raises(EndpointError) as told:
            keep(kept, sampler(url).sample(PROMPTS, FOUR))
    assert len(server.asked) == 6
    assert sorted(kept) == ["p0", "p2", "p3", "p5"]
    assert "2 of 6 prompts were refused, first file:" in str(told.value)
    assert "HTTP 400 (as told, scripted)" in str(told.value)


def test_what_is_under_way_is_kept_when_the_server_breaks():
    with serving() as (url, server):
        server.refuse = lambda body: 401 if body["prompt"] == "question 2" else None
        kept = []
        with pytest.raises(EndpointError, match="HTTP 401"):
            keep(kept, sampler(url, concurrency=2).sample(PROMPTS, FOUR))
    assert {"p0", "p1"} <= set(kept)
    # and nothing new was begun
    assert len(server.asked) <= 5


def test_log_probs_of_a_tempered_draw_are_warned_of_once(caplog):
    with serving() as (url, _), caplog.at_level(logging.WARNING):
        for config in (FOUR, FOUR, SamplingConfig(n=1)):
            one = sampler(url)
            one.check(PROMPTS, config)
            list(one.sample(PROMPTS[:1], config))
    assert caplog.text.count("vLLM's are raw, others may not say") == 2


IDS = [Prompt(f"p{i}", f"question {i}", (5, 6, i), f"file:{i}") for i in range(2)]


@pytest.mark.parametrize("way", ["token_ids", "token_id:"])
def test_ids_go_both_ways(way):
    def with_ids(choice, body):
        if way == "token_ids":
            return choice | {"token_ids": [9, 8, choice["index"]]}
        tokens = ["token_id:9", "token_id:8", f"token_id:{choice['index']}"]
        return choice | {"logprobs": choice["logprobs"] | {"tokens": tokens}}

    with serving() as (url, server):
        server.change = with_ids
        samples = by_id(sampler(url, form="ids").sample(IDS, FOUR))["p1"]
    asked = {tuple(body["prompt"]): body for body in server.asked}[(5, 6, 1)]
    assert (asked["return_token_ids"], asked["top_k"], asked["repetition_penalty"]) == (True, 0, 1)
    assert samples.completion_ids == [[9, 8, i] for i in range(4)]


def test_ids_that_do_not_come_are_told():
    with serving() as (url, _), pytest.raises(EndpointError, match="got text alone"):
        list(sampler(url, form="ids").sample(IDS, FOUR))


def test_prompts_without_ids_are_refused():
    with serving() as (url, server):
        with pytest.raises(InputError, match="file:0: prompts must have token ids"):
            list(sampler(url, form="ids").sample(PROMPTS, FOUR))
        assert server.asked == []


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"choices": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match="must be at least 1, got 0"):
        sampler("http://localhost:1/v1", **options)
