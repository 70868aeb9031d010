"""What a step holds for backward is bounded by the token budget, whatever N is."""

import pytest

from helpers.saved_bytes import peak_saved_bytes
from helpers.tiny import tiny
from helpers.tiny_groups import ids
from sharpen.training.groups import Group
from sharpen.training.losses import Dpo, Likelihood, Square
from sharpen.training.options import FitOptions, trainer_arguments
from sharpen.training.trainer import GroupTrainer

PROMPT, LENGTH, CONTEXT = 40, 20, 256


def group(n, seed):
    completions = [ids(LENGTH, 1000 * seed + g) for g in range(n)]
    return Group(
        ids(PROMPT, seed),
        completions,
        weight=[1 / n] * n,
        reference=[-40.0] * n,
        reward=[-float(g) for g in range(n)],
        pairs=[(g, g + 1) for g in range(0, n, 2)],
    )


def peak(folder, groups, objective, max_tokens):
    model = tiny(max_position_embeddings=CONTEXT)
    options = FitOptions(batch=len(groups), more={"report_to": "none"})
    args = trainer_arguments(options, folder, is_cpu=True)
    trainer = GroupTrainer(model, groups, objective, args, max_tokens=max_tokens)
    assert trainer.scorer._gradient_sharing == "cache"  # probed before anything is counted
    return peak_saved_bytes(trainer.train)


@pytest.mark.parametrize("objective", [Likelihood(), Square(1.0, 0.1), Dpo(1.0)], ids=repr)
def test_a_step_beyond_the_budget_holds_no_more_for_more_completions(tmp_path, objective):
    few, many = (peak(tmp_path, [group(n, 0)], objective, 300) for n in (8, 64))
    assert many <= 1.05 * few


def test_nor_for_more_prompts(tmp_path):
    few, many = (
        peak(tmp_path, [group(8, seed) for seed in range(n)], Square(1.0), 300) for n in (1, 6)
    )
    assert many <= 1.05 * few


def test_the_budget_is_what_bounds_it(tmp_path):
    """A budget as large as the batch takes one graph, which holds it all."""
    groups = [group(64, 0)]
    bounded, whole = (peak(tmp_path, groups, Square(1.0), tokens) for tokens in (300, 2**14))
    assert whole >= 4 * bounded
    twice = peak(tmp_path, groups, Square(1.0), 600)
    assert bounded < twice < whole
