"""Rounds of `xpo`: the pairs they gather, how they are judged, and a run from end to end."""

import json
import shutil

import pytest
import torch

from sharpen.cli import main
from sharpen.commands.train import Drawn
from sharpen.commands.xpo import N_JUDGE, Data, best_round, divide
from sharpen.errors import InputError
from sharpen.models import load_model
from sharpen.sampling import Prompt
from sharpen.scoring import Scorer, Scores

COMMON = [
    "--model",
    "game24",
    "--task",
    "game24",
    "--limit",
    "6",
    "--max-new-tokens",
    "40",
    "--max-tokens",
    "2000",
    "--device",
    "cpu",
    "--batch",
    "2",
    "--save-every",
    "1",
    "--trainer",
    "logging_steps=1",
]
PROMPTS = [Prompt(f"p{p}", "", (p,), "here") for p in range(2)]


pytestmark = pytest.mark.usefixtures("frozen_heap")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(name, base, own=None, finished=None, reward=None):
    """Samples of two prompts, of one token each; log-probs under the base, and who drew them."""
    own = base if own is None else own
    found = [
        {
            "completion_ids": [[ord(name), 10 * p + g] for g in range(len(group))],
            "logprobs": [[x / 2, x / 2] for x in own[p]],
        }
        for p, group in enumerate(base)
    ]
    scores = Scores.from_logprobs([[[x] for x in group] for group in base], finished)
    reference = scores.reward("logprob").double()
    reward = reference + 100 if reward is None else torch.tensor(reward, dtype=torch.float64)
    return Drawn(found, scores, reward, reference, ["q0", "q1"])


def test_pairs_of_a_round_are_of_the_policy_first_and_its_own_base_samples():
    data = Data(PROMPTS)
    base = drawn("b", [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0]])
    # the base's samples 2 and 3 are those of round 2
    policy = drawn("y", [[-10.0, -11.0], [-12.0, -13.0]])
    data.add(policy, base, 2, n=2, beta=1.0)
    one, two = data.groups()
    y, b = ord("y"), ord("b")
    assert (one.prompt_ids, one.completion_ids) == ([0], [[y, 0], [b, 2], [y, 1], [b, 3]])
    assert one.reference == [-10.0, -3.0, -11.0, -4.0]
    assert one.reward == [90.0, 97.0, 89.0, 96.0]
    assert one.pairs == two.pairs == [(0, 1), (2, 3)]
    assert (two.prompt_ids, two.completion_ids) == ([1], [[y, 10], [b, 12], [y, 11], [b, 13]])
    # rounds add up
    data.add(policy, base, 1, n=2, beta=1.0)
    assert data.groups()[0].pairs == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert data.groups()[0].completion_ids[5] == [b, 0]


def test_bounds_are_the_largest_of_what_is_fitted():
    data = Data(PROMPTS)
    base = drawn("b", [[-1.0, -2.0], [-3.0, -4.0]])
    policy = drawn("y", [[-5.0], [-9.0]], own=[[-8.0], [-7.5]])
    data.add(policy, base, 1, n=1, beta=0.5)
    # |beta log pi/pi_base|: 0.5 * 3 and 0.5 * 1.5; -log pi_base: up to 9
    assert (data.value_bound, data.reward_bound) == (1.5, 9.0)
    data.add(drawn("y", [[-2.0], [-2.0]]), base, 2, n=1, beta=0.5)
    assert (data.value_bound, data.reward_bound) == (1.5, 9.0)
    far = drawn("b", [[-1.0, -1.0, -30.0]] * 2)
    data.add(drawn("y", [[-2.0], [-2.0]]), far, 3, n=1, beta=0.5)
    assert (data.value_bound, data.reward_bound) == (1.5, 30.0)


def test_the_value_bound_is_over_both_sides_of_a_pair():
    data = Data(PROMPTS)
    base = drawn("b", [[-1.0, -2.0], [-3.0, -4.0]])
    policy = drawn("y", [[-5.0], [-9.0]], own=[[-8.0], [-7.5]])
    # of round 2, the second y' of each: from -2 to -9 and from -4 to -4
    data.add(policy, base, 2, n=1, beta=0.5, policy=[[-9.0], [-4.0]])
    assert data.value_bound == 0.5 * 7
    # a y' that the policy made likelier counts as well
    data.add(policy, base, 1, n=1, beta=2.0, policy=[[-1.0], [-0.5]])
    assert data.value_bound == 2.0 * 3
    # and one whose pair is left out does not
    cut = drawn("y", [[-5.0], [-9.0]], finished=[[False], [False]])
    data.add(cut, base, 1, n=1, beta=2.0, policy=[[-99.0], [-99.0]])
    assert data.value_bound == 2.0 * 3


@pytest.mark.parametrize("side", ["policy", "base"])
def test_a_pair_needs_both_of_its_sides(side):
    broken = {"finished": [[False], [True]], "reward": [1.0, 2.0]}
    whole = {"finished": [[True], [True]], "reward": [1.0, 2.0]}
    policy = drawn("y", [[-500.0], [-2.0]], **(broken if side == "policy" else whole))
    base = drawn("b", [[-900.0], [-2.0]], **(broken if side == "base" else whole))
    data = Data(PROMPTS)
    data.add(policy, base, 1, n=1, beta=1.0)
    assert [group.prompt_ids for group in data.groups()] == [[1]]
    # nor does it count in a bound
    assert data.reward_bound == 2.0


def test_no_pair_at_all_is_refused():
    data = Data(PROMPTS)
    nothing = drawn("y", [[-1.0], [-1.0]], finished=[[False], [False]])
    data.add(nothing, nothing, 1, n=1, beta=1.0)
    with pytest.raises(InputError, match="`n` must leave a finished pair of some prompt"):
        data.groups()


def test_prompts_are_divided_once_and_for_all():
    prompts = [Prompt(f"p{p}", "", (p,), "here") for p in range(10)]
    fitted, held = divide(prompts, 3, seed=5)
    assert (fitted, held) == divide(prompts, 3, seed=5)
    assert sorted(p.id for p in fitted + held) == [p.id for p in prompts]
    assert (len(fitted), len(held)) == (7, 3)
    assert len({tuple(p.id for p in divide(prompts, 3, seed=s)[1]) for s in range(9)}) > 3
    with pytest.raises(InputError, match="`validation` must leave prompts to fit, got 10 of 10"):
        divide(prompts, 10, seed=0)


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([-3.0, -2.0, -1.0, -4.0], 2),
        ([-1.0, -2.0], 0),
        ([-1.0, -1.0, -1.0], 0),
        ([-3.0, -2.0, -2.0], 1),
        ([None, -9.0, None], 1),
        ([None, None], 0),
    ],
)
def test_the_round_of_highest_value_is_kept(values, best):
    assert best_round([{"round": t, "value": value} for t, value in enumerate(values)]) == best


def check_terms(out, found):
    """Both terms and both bounds of each round, from the samples and models that it left."""
    base_rows = rows(out / "samples.jsonl")
    models = [load_model("game24", device="cpu")]
    models += [load_model(out / f"round-{t}" / "model", device="cpu") for t in (1, 2)]

    def logprob(model, row, ids):
        return Scorer(model).score([row["prompt_ids"]], [[ids]]).reward("logprob").item()

    data, value, bound = [], 0.0, 0.0
    for t in (1, 2):
        for p, own in enumerate(rows(out / f"round-{t}" / "samples.jsonl")):
            for i in range(2):
                sides = [(own, i), (base_rows[p], 2 * (t - 1) + i)]
                if all(row["finish_reasons"][g] == "stop" for row, g in sides):
                    data.append([(row, row["completion_ids"][g]) for row, g in sides])
                    # of the round's pairs, under the round's policy
                    l0 = [logprob(models[0], *side) for side in data[-1]]
                    moved = [logprob(models[t - 1], *side) for side in data[-1]]
                    value = max(value, *(abs(x - y) for x, y in zip(moved, l0, strict=True)))
                    bound = max(bound, *(-x for x in l0))
        # under what the round made of it; beta is 1
        errors, base = [], []
        for pair in data:
            l0, l1 = ([logprob(m, *side) for side in pair] for m in (models[0], models[t]))
            errors.append((l1[0] - l1[1]) - 2 * (l0[0] - l0[1]))
            base.append(l1[1])
        row = found[t]
        assert row["pairs"] == len(data)
        assert row["square"] == pytest.approx(sum(e**2 for e in errors) / len(data), rel=1e-3)
        assert row["base_logprob"] == pytest.approx(sum(base) / len(base), rel=1e-4)
        assert row["optimism_term"] == pytest.approx(row["optimism"] * row["base_logprob"])
        assert row["value_bound"] == pytest.approx(value, abs=1e-4)
        assert row["reward_bound"] == pytest.approx(bound, rel=1e-4)
        assert row["optimism"] == pytest.approx(row["alpha"] * (value + bound) ** 2, rel=1e-3)


def test_xpo_samples_from_the_policy_keeps_the_best_round_and_goes_on(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    argv = ["xpo", *COMMON, "--limit", "3", "-n", "2", "--rounds", "2", "--validation", "1"]
    assert main([*argv, "--lr", "1e-5", "--out", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "J_beta on 1 held-out prompts: base -" in printed
    found = rows(whole / "rounds.jsonl")
    assert [row["round"] for row in found] == [0, 1, 2]
    # J_beta of each round, from what it left: mean of r - beta (log pi - log pi_base), beta 1
    for t, value in enumerate(row["value"] for row in found):
        folder = (whole / f"round-{t}" if t else whole) / "validation"
        judged = zip(rows(folder / "samples.jsonl"), rows(folder / "scores.jsonl"), strict=True)
        terms = [
            2 * sum(base) - sum(own)
            for row, score in judged
            for own, base, reason in zip(
                row["logprobs"], score["logprob"], row["finish_reasons"], strict=True
            )
            if reason == "stop"
        ]
        assert 0 < len(terms) <= N_JUDGE
        assert value == pytest.approx(sum(terms) / len(terms), abs=1e-4)
    best = max(found, key=lambda row: row["value"])["round"]
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["kept_round"], summary["rounds"]) == (best, found)
    kept = f"round {best}" if best else "the base"
    assert f"kept: {kept}\nround 1: mean e^2 {found[1]['square']:.4f}, optimism " in printed
    check_terms(whole, found)
    if best:
        kept = whole / f"round-{best}" / "model" / "model.safetensors"
        assert kept.read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    # the base's samples: one for each side of each round's pairs
    base_rows = rows(whole / "samples.jsonl")
    assert [len(row["completions"]) for row in base_rows] == [4, 4]
    # the policy of round 2 is the model of round 1, not the base
    policy = load_model(whole / "round-1" / "model", device="cpu")
    second = rows(whole / "round-2" / "samples.jsonl")
    scored = Scorer(policy).score(
        [row["prompt_ids"] for row in second], [row["completion_ids"] for row in second]
    )
    drawn = [sum(x) for row in second for x in row["logprobs"]]
    torch.testing.assert_close(scored.reward("logprob"), torch.tensor(drawn), atol=1e-4, rtol=0)
    # optimism alpha (V + R)^2 from what was seen; V is 0 as long as the policy is the base
    first = rows(whole / "round-1" / "samples.jsonl")
    seen = [sum(x) for row in first for x in row["logprobs"]]
    seen += [sum(x) for row in base_rows for x in row["logprobs"][:2]]
    assert found[1]["optimism"] == pytest.approx(1e-4 * min(seen) ** 2, rel=1e-3)
    # killed in the middle of round 2, whose last checkpoint is torn
    shutil.copytree(whole, cut)
    for gone in ("model", "round-2/model", "round-2/validation"):
        shutil.rmtree(cut / gone)
    last = max((cut / "round-2" / "checkpoints").iterdir())
    (last / "complete").unlink()
    assert main([*argv, "--lr", "1e-5", "--out", str(cut)]) == 0
    for name in ("model/model.safetensors", "round-2/model/model.safetensors", "rounds.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
