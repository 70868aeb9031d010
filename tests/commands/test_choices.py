"""What `sft` and `rlhf` fit of rated samples, by hand."""

import json
import math

import pytest
import torch

from sharpen.commands.inputs import Source
from sharpen.commands.rlhf import RlhfConfig, check, pair_rows, preferred
from sharpen.commands.rlhf import choose as choose_pairs
from sharpen.commands.sft import SftConfig, weights
from sharpen.commands.sft import choose as choose_best
from sharpen.commands.train import PAIRS, Drawn, rate
from sharpen.errors import InputError
from sharpen.records import PromptRecord
from sharpen.scoring import Scorer, Scores
from sharpen.training.losses import Dpo, Likelihood, Square

INF, NAN = math.inf, math.nan
# of two prompts; the last of the first was cut, the first of the second cannot be
LOGPROBS = [[[-1.0, -2.0], [-2.0], [-4.0], [-0.5]], [[-INF], [-6.0, -1.0], [-5.0]]]
FINISHED = [[True, True, True, False], [True, True, True]]
ROWS = [
    {
        "prompt_id": f"p{p}",
        "prompt_ids": [p],
        "completions": [f"c{p}{g}" for g in range(len(group))],
        "completion_ids": [[10 * p + g] * len(x) for g, x in enumerate(group)],
    }
    for p, group in enumerate(LOGPROBS)
]
MESSAGES = [{"role": "user", "content": "q1"}]
PROMPTS = ["q0", MESSAGES]


def drawn(reward=None):
    scores = Scores.from_logprobs(LOGPROBS, FINISHED)
    reference = scores.reward("logprob").double()
    reward = reference if reward is None else torch.tensor(reward, dtype=torch.float64)
    return Drawn(ROWS, scores, reward, reference, PROMPTS)


def test_the_reference_is_the_log_prob_whatever_the_reward(tmp_path):
    rows = [
        {
            "prompt_id": "p",
            "prompt_ids": [1],
            "completion_ids": [[2, 3], [4]],
            "finish_reasons": ["stop", "stop"],
        }
    ]
    # all are scored: the scorer is not called
    scored = {"prompt_id": "p", "logprob": [[-1.0, -2.0], [-4.0]]}
    (tmp_path / "scores.jsonl").write_text(json.dumps(scored) + "\n")
    source = Source([PromptRecord("here", "p", "q")], None, None)
    found = rate(tmp_path, Scorer("game24", device="cpu"), source, rows, "mean_logprob")
    assert (found.reference.tolist(), found.reward.tolist()) == ([-3.0, -4.0], [-1.5, -4.0])
    assert found.prompts == ["q"]


def sft(**options):
    return SftConfig(model="m", task="game24", out="x", **options)


def rlhf(out="x", **options):
    return RlhfConfig(model="m", task="game24", out=str(out), **options)


def test_cut_impossible_and_unrated_samples_are_not_used():
    assert drawn().usable.tolist() == [True, True, True, False, False, True, True]
    rated = drawn([0.0, NAN, INF, 0.0, 0.0, -INF, 1.0])
    assert rated.usable.tolist() == [True, False, False, False, False, False, True]


def test_the_best_that_is_usable_has_all_the_weight():
    assert weights(sft(), drawn()).tolist() == [0, 1, 0, 0, 0, 0, 1]
    # an infinite reward is no reward
    rated = drawn([0.0, NAN, INF, 9.0, 9.0, 1.0, 2.0])
    assert weights(sft(), rated).tolist() == [1, 0, 0, 0, 0, 0, 1]


def test_soft_and_equal_weights():
    # log-probs -3 -2 -4 | -7 -5 at lambda 2
    one = [math.exp(x / 2) for x in (-3, -2, -4)]
    two = [math.exp(x / 2) for x in (-7, -5)]
    want = [x / sum(one) for x in one] + [0, 0] + [x / sum(two) for x in two]
    got = weights(sft(weights="soft", soft_temperature=2.0), drawn())
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
    assert weights(sft(weights="equal"), drawn()).tolist() == [1, 1, 1, 0, 0, 1, 1]


def test_what_sft_fits_and_says():
    choice = choose_best(sft(per="sequence"), drawn())
    assert [(g.prompt_ids, g.completion_ids, g.weight) for g in choice.groups] == [
        ([0], [[1]], [1.0]),
        ([1], [[12]], [1.0]),
    ]
    assert choice.objective == Likelihood("sequence")
    assert choice.what == "2 completions"
    assert choice.found == {
        "completions_fitted": 2,
        "base_logprob_fitted": -3.5,
        "base_logprob_sampled": (-3 - 2 - 4 - 7 - 5) / 5,
    }


def test_pairs_keep_the_base_as_reference_beside_another_reward(tmp_path):
    rated = drawn([1.0, 2.0, 4.0, 8.0, 16.0, 3.0, 5.0])
    choice = choose_pairs(rlhf(tmp_path, pairs="best_worst", beta=0.5), rated)
    one, two = choice.groups
    assert (one.completion_ids, one.pairs) == ([[0, 0], [2]], [(1, 0)])
    assert (one.reference, one.reward) == ([-3.0, -4.0], [1.0, 4.0])
    assert (two.completion_ids, two.pairs) == ([[11, 11], [12]], [(1, 0)])
    assert (two.reference, two.reward) == ([-7.0, -5.0], [3.0, 5.0])
    assert choice.objective == Square(0.5)
    assert (choice.found, choice.what) == ({"pairs_fitted": 2}, "2 pairs")
    assert not (tmp_path / PAIRS).exists()


def test_standardising_scales_the_reward_and_not_the_reference(tmp_path):
    # centred by prompt: 1 -1 | -1 1, so sigma 1 of -3 -2 -4 is sqrt(2/3), of -7 -5 is 1
    options = {"pairs": "all", "standardise": "prompt"}
    one, two = choose_pairs(rlhf(tmp_path, **options), drawn()).groups
    assert one.reference == [-3.0, -2.0, -4.0]
    assert one.reward == pytest.approx([x / math.sqrt(2 / 3) for x in (-3, -2, -4)])
    assert (two.reference, two.reward) == ([-7.0, -5.0], [-7.0, -5.0])
    # all together: (1 + 0 + 1 + 1 + 1) / 5
    options["standardise"] = "all"
    one, two = choose_pairs(rlhf(tmp_path, **options), drawn()).groups
    assert one.reward == pytest.approx([x / math.sqrt(4 / 5) for x in (-3, -2, -4)])


def test_dpo_prefers_nothing_among_equals(tmp_path):
    assert preferred([(0, 1), (1, 2), (2, 0)], [1.0, 1.0, 0.0]) == [(1, 2)]
    rated = drawn([1.0, 1.0, 0.0, 9.0, 9.0, 2.0, 2.0])
    choice = choose_pairs(rlhf(tmp_path, pairs="all", loss="dpo", beta=0.3), rated)
    assert choice.objective == Dpo(0.3)
    assert [(g.prompt_ids, g.completion_ids, g.pairs) for g in choice.groups] == [
        ([0], [[0, 0], [1], [2]], [(0, 2), (1, 2)])
    ]
    # the square loss learns from a pair of equals that they are equal
    choice = choose_pairs(rlhf(tmp_path, pairs="all"), rated)
    assert choice.found == {"pairs_fitted": 4}


def test_preferences_are_written_as_trl_reads_them(tmp_path):
    choose_pairs(rlhf(tmp_path, pairs="best_worst", loss="dpo"), drawn())
    found = [json.loads(line) for line in (tmp_path / PAIRS).read_text().splitlines()]
    assert found == [
        {
            "prompt_id": "p0",
            "prompt": "q0",
            "chosen": "c01",
            "rejected": "c02",
            "prompt_ids": [0],
            "chosen_ids": [1],
            "rejected_ids": [2],
        },
        {
            "prompt_id": "p1",
            "prompt": MESSAGES,
            "chosen": [{"role": "assistant", "content": "c12"}],
            "rejected": [{"role": "assistant", "content": "c11"}],
            "prompt_ids": [1],
            "chosen_ids": [12],
            "rejected_ids": [11, 11],
        },
    ]
    assert list(pair_rows(ROWS[0], "q0", [])) == []


@pytest.mark.parametrize(
    ("options", "reward", "message"),
    [
        ({}, [NAN] * 7, "`n` must leave at least two finished completions of some prompt"),
        ({"samples": "s"}, [NAN] * 7, "`samples` must leave at least two finished completions"),
        ({"loss": "dpo"}, [1.0] * 7, "two finished completions of unequal reward of some prompt"),
    ],
)
def test_no_pair_at_all_is_refused(tmp_path, options, reward, message):
    with pytest.raises(InputError, match=message):
        choose_pairs(rlhf(tmp_path, **options), drawn(reward))


def test_options_without_effect_are_refused():
    with pytest.raises(InputError, match="`standardise` must be none with `--loss dpo`, got all"):
        check(rlhf(loss="dpo", standardise="all"))
