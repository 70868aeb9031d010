"""Differences between two engines in numbers worked by hand, and text that shows them."""

import json
import math

import numpy as np
import pytest

from helpers.completions_server import serving
from helpers.tiny import alone, ragged, tiny
from sharpen.errors import InputError
from sharpen.evaluation.parity import (
    compare,
    finite,
    format_parity,
    forward_logprobs,
    in_context,
    is_within,
    kept_logprobs,
    pair,
    server_logprobs,
    worst,
)
from sharpen.sampling.endpoint import EndpointClient, EndpointError

NAN, INF = float("nan"), float("inf")
OURS = [[[-1.0, -2.0], []], [[-0.5]]]
THEIRS = [[[-1.5, -2.0], []], [[-0.25]]]


def test_numbers_are_those_of_the_hand():
    found = compare(pair(OURS, THEIRS), clip=0.3)
    # differences of 0.5, 0 and -0.25
    assert (found["n_tokens"], found["n_completions"]) == (3, 3)
    assert (found["max"], found["mean"]) == (0.5, 0.25)
    assert found["signed_mean"] == pytest.approx(0.25 / 3)
    assert found["rms"] == pytest.approx(math.sqrt((0.25 + 0.0625) / 3))
    assert found["percentiles"] == {"p50": 0.25, "p90": 0.5, "p99": 0.5, "p99.9": 0.5}
    # of the sums 0.5, 0 and -0.25
    assert (found["completion_max"], found["completion_mean"]) == (0.5, 0.25)
    ratio = found["ratio"]
    assert ratio["max"] == pytest.approx(math.exp(0.5))
    assert ratio["min"] == pytest.approx(math.exp(-0.25))
    # e^0.5 - 1 = 0.65 is outside 0.3; 1 - e^-0.25 = 0.22 is not
    assert ratio["outside_clip"] == pytest.approx(1 / 3)
    assert ratio["k1"] == pytest.approx(-0.25 / 3)
    each = [math.exp(0.5) - 1.5, 0.0, math.exp(-0.25) - 1 + 0.25]
    assert ratio["k3"] == pytest.approx(sum(each) / 3)
    counts = {(row["from"], row["to"]): row["n"] for row in found["histogram"]}
    assert counts[0.0, 0.0] == 1
    assert counts[0.1, 1.0] == 2
    assert sum(counts.values()) == 3


def test_k3_estimates_the_divergence_of_the_sampler_from_us():
    generator = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.4, 0.2])
    drawn = generator.choice(3, size=20000, p=p)
    found = compare(pair([[np.log(q)[drawn].tolist()]], [[np.log(p)[drawn].tolist()]]))
    kl = float((p * np.log(p / q)).sum())
    assert found["ratio"]["k1"] == pytest.approx(kl, abs=6e-3)
    assert found["ratio"]["k3"] == pytest.approx(kl, abs=1e-3)


def test_every_decade_has_its_bar():
    sizes = [0.0, 1e-8, 5e-7, 5e-6, 5e-5, 5e-4, 5e-3, 5e-2, 0.5, 5.0, INF]
    rows = compare(pair([[[-x for x in sizes]]], [[[0.0] * len(sizes)]]))["histogram"]
    assert [row["n"] for row in rows] == [1] * 9 + [2]


def test_nan_is_counted_and_left_out_and_infinity_is_the_worst():
    ours = [[[NAN, -1.0, NAN, -INF, -INF, -2.0]]]
    theirs = [[[NAN, -1.0, -3.0, -INF, -4.0, -2.5]]]
    pairs = pair(ours, theirs)
    found = compare(pairs)
    assert (found["n_tokens"], found["n_nan"], found["n_nan_one_side"]) == (4, 2, 1)
    # equal infinities agree
    assert found["histogram"][0]["n"] == 2
    assert found["max"] == INF
    assert (found["ratio"]["min"], found["ratio"]["k3"]) == (0.0, INF)
    # impossible under them alone
    assert compare(pair([[[-1.0]]], [[[-INF]]]))["ratio"]["k3"] == INF
    # NaN on one side first, then infinity
    assert [pairs.places[i].t for i in worst(pairs, 9)] == [2, 4, 5]
    assert not is_within(found, 1e300, "max")
    json.dumps(finite(found), allow_nan=False)
    assert finite(found)["max"] == "inf"


def test_the_worst_come_first_and_ties_by_place():
    pairs = pair([[[-1.0, -2.0, -3.0, -4.0]]], [[[-1.1, -2.3, -3.3, -4.0]]])
    assert [pairs.places[i].t for i in worst(pairs, 2)] == [1, 2]
    # none that agree to the bit
    assert [pairs.places[i].t for i in worst(pairs, 9)] == [1, 2, 0]
    assert worst(pairs, 0) == []


@pytest.mark.parametrize(
    ("measure", "tolerance", "holds"),
    [
        ("max", 0.5, True),
        ("max", 0.49, False),
        ("mean", 0.25, True),
        ("mean", 0.24, False),
        ("p99", 0.5, True),
        ("p99", 0.49, False),
    ],
)
def test_the_tolerance_is_on_the_measure(measure, tolerance, holds):
    assert is_within(compare(pair(OURS, THEIRS)), tolerance, measure) == holds


def test_nan_on_one_side_is_never_within():
    found = compare(pair([[[-1.0, NAN]]], [[[-1.0, -1.0]]]))
    assert (found["max"], is_within(found, 1.0, "max")) == (0.0, False)
    both = compare(pair([[[-1.0, NAN]]], [[[-1.0, NAN]]]))
    assert is_within(both, 0.0, "max")


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([[[-1.0]]], [[[-1.0, -2.0]]], "other numbers of log-probs"),
        ([[[-1.0], []]], [[[-1.0]]], "other numbers of log-probs"),
        ([[[]]], [[[]]], "got empty completions"),
        ([[[NAN]]], [[[-1.0]]], "got 1, all of them NaN"),
    ],
)
def test_nothing_to_compare_is_told(ours, theirs, message):
    with pytest.raises(InputError, match=message):
        compare(pair(ours, theirs))


def test_a_token_is_shown_with_what_stands_around_it():
    pairs = pair([[[-1.0, -2.0, -3.0]]], [[[-1.0, -2.5, -3.0]]])
    shown = in_context(pairs, 1, [7, 8], [1, 2, 3], lambda ids: " ".join(map(str, ids)))
    assert (shown["before"], shown["token"], shown["after"]) == ("7 8 1", "2", "3")
    assert (shown["token_id"], shown["position"], shown["difference"]) == (2, 1, 0.5)
    found = compare(pairs)
    report = {
        "ours": "a",
        "theirs": "b",
        "tolerance": 0.1,
        "measure": "max",
        "is_within": False,
        "differences": found,
        "worst": [{"place": "prompt-1", **shown}],
    }
    text = format_parity(report)
    assert "prompt-1, completion 0, token 1" in text
    assert "7 8 1[2]3" in text
    assert "max 0.5 is ABOVE the tolerance 0.1" in text
    assert "         0.1 to 1         1 ####" in text


def test_a_plain_forward_is_the_model_alone():
    model = tiny("qwen3")
    prompts, completions = ragged()
    found = forward_logprobs(model, prompts, completions)
    assert [[len(x) for x in g] for g in found] == [[len(x) for x in g] for g in completions]
    flat = [x for group in found for ids in group for x in ids]
    assert flat == pytest.approx(alone(model, prompts, completions).tolist(), abs=1e-5)


def echo(body, more):
    ids = body["prompt"]
    values = [None, *[-float(i) for i in ids[1:]], *[-99.0] * more]
    return {"choices": [{"logprobs": {"tokens": list(map(str, values)), "token_logprobs": values}}]}


@pytest.mark.parametrize("more", [0, 1])
def test_a_server_echoes_the_tokens_in_their_place(more):
    with serving() as (url, server):
        server.answer = lambda body: echo(body, more)
        client = EndpointClient(url)
        found = server_logprobs(client, "m", [[9, 8], [7]], [[[1, 2], []], [[3], [4, 5]]])
    assert found == [[[-1.0, -2.0], []], [[-3.0], [-4.0, -5.0]]]
    assert {body["model"] for body in server.asked} == {"m"}


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"choices": [{"text": "a"}]},
        echo({"prompt": [1]}, 0),
        echo({"prompt": [1] * 9}, 0),
    ],
    ids=["none", "no-logprobs", "short", "long"],
)
def test_a_server_that_does_not_echo_is_told(answer):
    with serving() as (url, server):
        server.answer = lambda body: answer
        with pytest.raises(EndpointError, match="must echo 3 tokens with their log-probs"):
            server_logprobs(EndpointClient(url), "m", [[9, 8]], [[[1]]])


def test_kept_log_probs_are_read_from_records():
    rows = [
        {"completions": ["a"], "logprobs": [[-1.0, None]]},
        {"completion": "a", "logprobs": [-2.0]},
    ]
    first, second = kept_logprobs(["f:1", "f:2"], rows)
    assert second == [[-2.0]]
    assert first[0][0] == -1.0
    assert math.isnan(first[0][1])
    for bad in ({"completions": ["a"]}, {"completions": ["a"], "logprobs": [-1.0]}):
        with pytest.raises(InputError, match=r"f:1: must have the sampler's own `logprobs`"):
            kept_logprobs(["f:1"], [bad])


BAD = ["a", "-1.0", True, [-1.0], {"logprob": -1.0}]


@pytest.mark.parametrize("value", BAD, ids=str)
def test_what_is_no_number_among_kept_log_probs_is_named(value):
    rows = [{"logprobs": [[-1.0]]}, {"logprobs": [[-1.0], [-1, None, value]]}]
    with pytest.raises(InputError) as told:
        kept_logprobs(["s.jsonl:1", "s.jsonl:2"], rows)
    wanted = f"s.jsonl:2: `logprobs`[1][2] must be a number or null, got {value!r}"
    assert str(told.value).startswith(wanted)


@pytest.mark.parametrize("value", BAD, ids=str)
def test_what_is_no_number_in_an_answer_is_named(value):
    def answer(body):
        found = echo(body, 1)
        found["choices"][0]["logprobs"]["token_logprobs"][3] = value
        return found

    with serving() as (url, server):
        server.answer = answer
        with pytest.raises(EndpointError) as told:
            server_logprobs(EndpointClient(url), "m", [[9, 8]], [[[1, 2]]])
    assert url in str(told.value)
    assert f"`token_logprobs`[3] must be a number or null, got {value!r}" in str(told.value)
