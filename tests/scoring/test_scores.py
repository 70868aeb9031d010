import pytest
import torch

from sharpen import Scores
from sharpen.errors import InputError

LOGPROBS = [[[-1.0, -2.0], []], [], [[-0.25], [-1.0, -1.0, -1.0]]]


def test_layout_of_ragged_groups():
    scores = Scores.from_logprobs(LOGPROBS)
    assert scores.tokens.logprob is not None
    assert scores.tokens.logprob.tolist() == [-1.0, -2.0, -0.25, -1.0, -1.0, -1.0]
    assert scores.tokens.entropy is None
    assert scores.offsets.tolist() == [0, 2, 2, 3, 6]
    assert scores.groups.tolist() == [0, 2, 2, 4]
    assert scores.valid.tolist() == [True] * 4


def test_by_prompt_keeps_input_order_and_empty_prompts():
    rewards = Scores.from_logprobs(LOGPROBS).by_prompt("mean_logprob")
    assert [r.tolist() for r in rewards] == [[-1.5, 0.0], [], [-0.25, -1.0]]


def test_no_prompts_at_all():
    scores = Scores.from_logprobs([])
    assert scores.offsets.tolist() == [0]
    assert scores.reward("logprob").shape == (0,)
    assert scores.by_prompt("logprob") == []


def test_valid_is_kept_and_checked():
    scores = Scores.from_logprobs(LOGPROBS, valid=[[True, False], [], [False, True]])
    assert scores.valid.tolist() == [True, False, False, True]
    with pytest.raises(InputError, match=r"`valid` .* \[2, 0, 2\] for the prompts, got \[2, 0\]"):
        Scores.from_logprobs(LOGPROBS, valid=[[True, False], []])


def test_nan_completions_are_named_by_prompt_and_index():
    nan = float("nan")
    scores = Scores.from_logprobs([[[-1.0], [nan, -1.0]], [], [[-1.0, nan]]])
    assert scores.nan_completions() == [(0, 1), (2, 0)]


def test_scores_are_frozen():
    scores, field = Scores.from_logprobs(LOGPROBS), "valid"
    with pytest.raises(AttributeError):
        setattr(scores, field, torch.tensor([True]))
