"""The scorer against log_softmax of one sequence at a time, in fp64."""

import copy

import pytest
import torch

from helpers.oracle import assert_as_accurate
from helpers.tiny import FAMILIES, alone, opaque, ragged, tiny
from sharpen import Scorer
from sharpen_kernels.stats import NAMES

ONE_BY_ONE, SOME, ALL = 1, 40, 100_000
OPAQUE = "opaque head"


def logprobs(scorer, prompts, completions):
    """What `score` gives for each token."""
    got = scorer.score(prompts, completions).tokens.logprob
    assert got is not None
    return got


def gradient(model, logprob):
    """Gradient of a signed sum of the log-probs with respect to every parameter, as one vector."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(len(logprob), generator=generator).to(logprob)
    model.zero_grad()
    (weight * logprob).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("max_tokens", [ONE_BY_ONE, SOME, ALL])
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_fp64_as_well_as_one_at_a_time_does(family, max_tokens):
    model = tiny(family)
    exact = copy.deepcopy(model).double()
    got, low, truth = [], [], []
    scorer = Scorer(model, max_tokens=max_tokens)
    for seed in range(3):
        prompts, completions = ragged(seed)
        got.append(logprobs(scorer, prompts, completions))
        with torch.no_grad():
            low.append(alone(model, prompts, completions))
            truth.append(alone(exact, prompts, completions))
    assert scorer.route.head == "hidden"
    assert_as_accurate(family, torch.cat(got), torch.cat(low), torch.cat(truth), floor=1e-6)


@pytest.mark.parametrize("max_tokens", [ONE_BY_ONE, SOME, ALL])
def test_logits_route_matches_fp64_as_well(max_tokens):
    model = opaque()
    exact = copy.deepcopy(model).double()
    prompts, completions = ragged()
    scorer = Scorer(model, max_tokens=max_tokens)
    got = logprobs(scorer, prompts, completions)
    with torch.no_grad():
        low, truth = (alone(m, prompts, completions) for m in (model, exact))
    assert scorer.route.head == "logits"
    assert_as_accurate("logits route", got, low, truth, floor=1e-6)


@pytest.mark.parametrize("max_tokens", [ONE_BY_ONE, SOME])
@pytest.mark.parametrize("family", [*FAMILIES, OPAQUE])
def test_gradients_match_fp64_as_well_as_one_at_a_time_does(family, max_tokens):
    model = opaque() if family == OPAQUE else tiny(family)
    exact = copy.deepcopy(model).double()
    prompts, completions = ragged()
    got = gradient(model, Scorer(model, max_tokens=max_tokens).logprobs(prompts, completions))
    low = gradient(model, alone(model, prompts, completions))
    truth = gradient(exact, alone(exact, prompts, completions))
    scale = truth.abs().max()
    assert_as_accurate("gradient", got / scale, low / scale, truth / scale, floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2-softcap", "cohere-multiplies"])
def test_half_precision_is_no_worse_than_one_at_a_time(family, dtype):
    model = tiny(family).to(dtype)
    exact = copy.deepcopy(model).double()
    prompts, completions = ragged()
    scorer = Scorer(model, max_tokens=SOME)
    got = logprobs(scorer, prompts, completions)
    with torch.no_grad():
        low, truth = (alone(m, prompts, completions) for m in (model, exact))
    assert scorer.route.head == "hidden"
    assert got.dtype == torch.float32
    assert_as_accurate(family, got, low, truth, floor=1e-6)


@pytest.mark.parametrize("build", [tiny, opaque], ids=["hidden", "logits"])
def test_model_and_log_probs_stay_on_their_device_and_scores_on_the_cpu(build, device):
    model = build().to(device)
    prompts, completions = ragged()
    scorer = Scorer(model, max_tokens=SOME)
    with torch.no_grad():
        want = alone(model, prompts, completions)
        direct = scorer.logprobs(prompts, completions)
    got = logprobs(scorer, prompts, completions)
    assert (got.device.type, direct.device.type) == ("cpu", device)
    torch.testing.assert_close(direct, want, atol=2e-5, rtol=0)
    assert torch.equal(got, direct.cpu())


def test_fp64_model_gives_fp64_log_probs():
    model = tiny().double()
    prompts, completions = ragged()
    with torch.no_grad():
        got = Scorer(model).logprobs(prompts, completions)
        want = alone(model, prompts, completions)
    # the model's own norms run in fp32, so batches agree to fp32
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert got.dtype == torch.float64


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_reaches_no_score_under_either_attention(attention):
    model = tiny("mistral-window")
    model.set_attn_implementation(attention)
    prompts, completions = ragged()
    with torch.no_grad():
        want = alone(model, prompts, completions)
    got = logprobs(Scorer(model, max_tokens=ALL), prompts, completions)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_long_and_short_sequences_of_longrope_do_not_share_a_batch():
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 9,
    }
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=9)
    prompts, completions = ragged()
    # the reference reads the last token too: no sequence may end at the boundary
    assert all(len(p) + len(c) != 10 for p, g in zip(prompts, completions, strict=True) for c in g)
    with torch.no_grad():
        want = alone(model, prompts, completions)
    got = logprobs(Scorer(model, max_tokens=ALL), prompts, completions)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=0)


def test_statistics_of_both_routes_agree():
    prompts, completions = ragged()
    scorers = Scorer(tiny("phi-bias")), Scorer(opaque("phi-bias", cap=None))
    hidden, logits = (s.score(prompts, completions, stats=NAMES).tokens for s in scorers)
    assert [s.route.head for s in scorers] == ["hidden", "logits"]
    for name in NAMES:
        torch.testing.assert_close(getattr(hidden, name), getattr(logits, name))
