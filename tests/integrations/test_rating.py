"""What rates inside a host: a model here, one that is served, and what was rated before."""

import json
import os

import pytest
import torch

from helpers.completions_server import serving
from helpers.tiny import alone, ragged, tiny
from sharpen.errors import InputError
from sharpen.integrations.reward_model import EMPTY, Rating, not_finite, rate_by
from sharpen.scoring import Scorer, Scores
from sharpen.server.unscorable import UnscorableReward


@pytest.fixture
def scorer():
    return Scorer(tiny())


def groups():
    """`ragged` without its empty completion and its prompt without any."""
    prompts, completions = ragged()
    return [prompts[0], prompts[3]], [[c for c in completions[0] if c], completions[3]]


def settled(rated, otherwise):
    return UnscorableReward(otherwise).resolve(rated)


def flat(rewards):
    return [x for group in rewards for x in group]


def test_rewards_are_those_of_the_scorer_in_place(scorer):
    prompts, completions = groups()
    found = rate_by(Rating(model="tiny", reward="logprob"), scorer)(prompts, completions)
    each = alone(scorer.model, prompts, completions)
    sums = [x.sum().item() for x in each.split([len(c) for g in completions for c in g])]
    assert [len(group) for group in found] == [3, 3]
    assert flat(found) == pytest.approx(sums, abs=1e-4)


def test_rewards_of_other_statistics(scorer):
    prompts, completions = groups()
    rate = rate_by(Rating(model="tiny", reward="self_certainty"), scorer)
    scores = scorer.score(prompts, completions, stats=("logprob", "self_certainty"))
    assert flat(rate(prompts, completions)) == scores.reward("self_certainty").tolist()


def test_a_served_model_gives_the_same(scorer):
    prompts, completions = groups()

    def echo(body):
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            rows = scorer.model(ids).logits[0, :-1].log_softmax(1)
        values = rows.gather(1, ids[0, 1:, None])[:, 0].tolist()
        tokens = [str(i) for i in body["prompt"]]
        # and one that it had to generate
        logprobs = {"tokens": [*tokens, "x"], "token_logprobs": [None, *values, -9.0]}
        return {"choices": [{"text": "", "logprobs": logprobs}]}

    with serving() as (url, server):
        server.answer = echo
        rating = Rating(reward="mean_logprob", endpoint=url, endpoint_model="tiny")
        found = rate_by(rating)(prompts, completions)
    assert all(body["echo"] and body["logprobs"] == 1 for body in server.asked)
    wanted = rate_by(Rating(model="tiny", reward="mean_logprob"), scorer)(prompts, completions)
    assert flat(found) == pytest.approx(flat(wanted), abs=1e-5)


def test_what_was_rated_is_kept_across_processes(scorer, tmp_path):
    prompts, completions = groups()
    rating = Rating(model="tiny", reward="logprob", keep=str(tmp_path / "kept"))
    asked = []
    score = scorer.score

    def counted(prompts, completions, **options):
        asked.append(sum(map(len, completions)))
        return score(prompts, completions, **options)

    scorer.score = counted
    first = rate_by(rating, scorer)
    twice = [[*group, group[0]] for group in completions]
    found = first(prompts, twice)
    assert [group[0] for group in found] == [group[-1] for group in found]
    assert first(prompts, twice) == found
    # another process: another file, what it finds there is known; a torn line is not
    (path,) = (tmp_path / "kept").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    path.write_bytes(b"".join(lines[:4]) + lines[4][:9])
    again = rate_by(rating, scorer)
    assert again(prompts, completions) == [group[:-1] for group in found]
    assert asked == [6, 2]
    # another reward is another number
    other = rate_by(Rating(model="tiny", reward="mean_logprob", keep=rating.keep), scorer)
    other(prompts, completions)
    assert asked == [6, 2, 6]
    assert {tuple(json.loads(line)) for line in lines} == {("key", "reward")}


def test_a_completion_without_a_reward_is_told_in_its_place(scorer, tmp_path):
    kept = tmp_path / "kept"
    rate = rate_by(Rating(model="tiny", keep=str(kept)), scorer)
    ((alone,),) = rate([[1, 2]], [[[3]]])
    long = [3] * scorer.model.config.max_position_embeddings
    found = rate([[1, 2], [4]], [[[3], [], long], [[]]])
    assert found[0][0] == pytest.approx(alone, abs=1e-5)
    assert [one.cause for one in (*found[0][1:], *found[1])] == ["empty", "too_long", "empty"]
    with pytest.raises(InputError, match="at least one token to be rated"):
        settled(found[0][1], None)
    with pytest.raises(InputError, match=r"must fit the context of \d+ tokens .* got 2 \+ "):
        settled(found[0][2], None)
    # what fits but for the last token, which is never read, is rated
    assert isinstance(rate([[1, 2]], [[long[1:]]])[0][0], float)
    with torch.no_grad():
        scorer.model.lm_head.weight[5] = float("nan")
    ((broken,),) = rate([[1, 2]], [[[6]]])
    with pytest.raises(InputError, match="`reward` logprob is NaN"):
        settled(broken, None)
    assert broken.cause == "not_finite"
    # only numbers are kept
    (path,) = kept.iterdir()
    assert len(path.read_text().splitlines()) == 2


def test_an_impossible_token_has_no_reward(scorer, monkeypatch):
    kept = Scores.from_logprobs([[[-1.0, -float("inf")]]])
    monkeypatch.setattr(scorer, "score", lambda *_, **__: kept)
    ((found,),) = rate_by(Rating(model="tiny"), scorer)([[1]], [[[2, 3]]])
    assert found.cause == "not_finite"
    assert "`reward` logprob is -inf: the model calls one of its tokens impossible" in found.why


@pytest.mark.parametrize("given", [float("nan"), float("inf"), "0", True])
def test_what_such_a_completion_gets_is_a_finite_number(given):
    with pytest.raises(InputError, match="`unscorable_reward` must be a finite number, or left"):
        Rating.of({"model": "m", "unscorable_reward": given})
    assert Rating.of({"model": "m", "unscorable_reward": -3}).unscorable_reward == -3


def test_each_cause_is_logged_once(caplog):
    for found in (EMPTY, EMPTY, not_finite("logprob", float("nan")), EMPTY):
        assert settled(found, -3.0) == -3
    assert [settled(x, -3.0) for x in (0.5, 0.0)] == [0.5, 0]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "got none); it gets `unscorable_reward`, -3. Others of its kind" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "`model` must be given, or `endpoint`"),
        ({"model": "m", "reward": "beauty"}, "`reward` must be one of"),
        ({"model": "m", "reward": "majority"}, "needs answers, which no host hands over"),
        ({"model": "m", "rewrad": "logprob"}, "unknown option 'rewrad' of sharpen; known: model"),
        ({"endpoint": "http://localhost/v1"}, "`endpoint_model` must be given"),
        (
            {"endpoint": "http://localhost/v1", "endpoint_model": "m", "reward": "neg_entropy"},
            "needs entropy, which an endpoint does not give",
        ),
    ],
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(InputError) as told:
        Rating.of(given)
    assert message in str(told.value)


def test_a_missing_key_is_told(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "NO_SUCH_KEY" not in os.environ
    rating = Rating(
        endpoint="http://localhost/v1", endpoint_model="m", endpoint_key_env="NO_SUCH_KEY"
    )
    with pytest.raises(InputError, match="NO_SUCH_KEY must hold the key"):
        rate_by(rating)
