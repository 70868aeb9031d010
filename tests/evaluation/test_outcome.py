import dataclasses

import numpy as np
import pytest

from sharpen.errors import InputError
from sharpen.evaluation import Outcome, Texts

ZERO_PG = np.zeros((3, 2))
TRUE_PG = np.ones((3, 2), dtype=bool)

BAD = {
    "no samples": (
        {"valid_PG": np.ones((3, 0), dtype=bool)},
        r"`valid_PG` must have shape .* got \(3, 0\)",
    ),
    "reward shape": (
        {"reward_PG": {"logprob": np.zeros((3, 4))}},
        r"`reward_PG\['logprob'\]` must be float64 of shape \(P=3, G=2\), got float64 .*\(3, 4\)",
    ),
    "reward dtype": ({"reward_PG": {"logprob": ZERO_PG.astype(np.float32)}}, "got float32"),
    "no logprob": ({"reward_PG": {"other": ZERO_PG}}, "must hold 'logprob'"),
    "grades shape": ({"correct_PG": TRUE_PG[:2]}, r"`correct_PG` must be bool .*P=3"),
    "grades dtype": ({"correct_PG": ZERO_PG}, "`correct_PG` must be bool"),
    "greedy shape": (
        {"correct_PG": TRUE_PG, "greedy_correct_P": np.ones(2, dtype=bool)},
        r"`greedy_correct_P` must be bool of shape \(P=3\)",
    ),
    "greedy alone": ({"greedy_correct_P": np.ones(3, dtype=bool)}, "needs `correct_PG`"),
    "answers rows": ({"answers": [["a", "b"]]}, "`answers` must hold P=3 lists, got 1"),
    "answers row": ({"answers": [["a", "b"], ["a"], ["a", "b"]]}, r"`answers\[1\]`.*G=2.*got 1"),
    "mass alone": ({"reward_PG": {"logprob": ZERO_PG, "rpc": ZERO_PG}}, "`answers` must be"),
    "mass of what": (
        {"reward_PG": {"logprob": ZERO_PG, "rpc": ZERO_PG}, "answers": [["a", "b"]] * 3},
        "`response_PG` must be given with the reward 'rpc'",
    ),
    "response dtype": ({"response_PG": ZERO_PG}, "`response_PG` must be int64"),
    "vote alone": ({"reward_PG": {"logprob": ZERO_PG, "majority": ZERO_PG}}, "`answers` must be"),
}


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_bad_field_is_named_with_what_was_wanted(fields, message):
    with pytest.raises(InputError, match=message):
        Outcome(**{"reward_PG": {"logprob": ZERO_PG}, "valid_PG": TRUE_PG} | fields)


def test_invalid_and_undefined_are_not_eligible():
    logprob_PG = np.array([[-1.0, np.nan, -np.inf, -2.0]])
    valid_PG = np.array([[False, True, True, True]])
    outcome = Outcome({"logprob": logprob_PG}, valid_PG, answers=[["a", "a", None, "b"]])
    assert outcome.eligible("logprob").tolist() == [[False, False, True, True]]
    assert outcome.eligible("majority").tolist() == [[False, True, True, True]]
    with pytest.raises(InputError, match=r"`reward` must be one of logprob, majority, got 'best'"):
        outcome.eligible("best")


def test_majority_is_a_reward_only_with_answers(make_outcome):
    assert make_outcome().rewards == ("logprob", "mean_logprob", "majority")
    assert make_outcome(answers=False).rewards == ("logprob", "mean_logprob")


def test_a_vote_defined_nowhere_is_not_eligible(make_outcome):
    outcome = make_outcome()
    undefined = dict(outcome.reward_PG, majority=np.full(outcome.valid_PG.shape, np.nan))
    assert not dataclasses.replace(outcome, reward_PG=undefined).eligible("majority").any()


def test_texts_must_be_those_of_the_outcome(make_outcome):
    with pytest.raises(InputError, match="one list per prompt, 2 lists, got 1"):
        Texts(["a", "b"], [["c"]])
    with pytest.raises(InputError, match="`completions` must hold P=7 lists, got 1"):
        Texts(["a"], [["b"]]).check(make_outcome())
