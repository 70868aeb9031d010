"""Scores of the law that sampling at a temperature draws from."""

import copy
import math

import pytest
import torch

from helpers.oracle import assert_as_accurate
from helpers.tiny import FAMILIES, alone, opaque, ragged, tiny
from sharpen import Scorer
from sharpen.errors import InputError

T = 0.6


@pytest.mark.parametrize("family", [*FAMILIES, "opaque head"])
def test_scores_and_gradients_are_those_of_divided_logits(family):
    model = tiny(family) if family in FAMILIES else opaque()
    exact = copy.deepcopy(model).double()
    prompts, completions = ragged()
    scorer = Scorer(model, max_tokens=40)
    got = scorer.logprobs(prompts, completions, temperature=T)
    low, truth = (alone(m, prompts, completions, T) for m in (model, exact))
    assert_as_accurate(family, got, low, truth, floor=1e-6)
    scored = scorer.score(prompts, completions, temperature=T)
    torch.testing.assert_close(scored.tokens.logprob, got.detach(), atol=1e-6, rtol=0)
    # it is not the model's own law
    assert (truth - alone(exact, prompts, completions)).abs().max() > 0.01
    weight = torch.randn(len(got), generator=torch.Generator().manual_seed(1))
    slopes = []
    for m, logprob in ((model, got), (model, low), (exact, truth)):
        m.zero_grad()
        (weight.to(logprob) * logprob).sum().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    assert_as_accurate(f"{family}: gradient", *slopes, floor=1e-6)


def test_statistics_are_of_the_same_law():
    prompts, completions = [[1, 5, 9]], [[[7]]]
    model = tiny().double()
    tokens = Scorer(model).score(prompts, completions, stats=("entropy",), temperature=T).tokens
    with torch.no_grad():
        p = (model(torch.tensor(prompts)).logits[0, -1] / T).softmax(0)
    assert tokens.entropy.item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)


def test_text_is_scored_alike():
    scorer = Scorer("game24", device="cpu")
    ids = (
        scorer.tokenizer("1 2 3 4")["input_ids"],
        scorer.tokenizer("1 + 2", add_special_tokens=False)["input_ids"],
    )
    of_text = scorer.score_text(["1 2 3 4"], [["1 + 2"]], temperature=T)
    assert torch.equal(
        of_text.tokens.logprob, scorer.score([ids[0]], [[ids[1]]], temperature=T).tokens.logprob
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_what_logits_cannot_be_divided_by_is_refused(temperature):
    scorer = Scorer(tiny())
    for method in (scorer.score, scorer.logprobs):
        with pytest.raises(InputError, match="`temperature` must be above 0 and finite"):
            method([[1]], [[[2]]], temperature=temperature)
