"""Whether a reward tells right from wrong among the completions of one prompt.

A choice is made within a prompt, so only the order within it counts: a reward can separate easy
prompts from hard ones, and look good over all completions together, without helping any choice.

P prompts, G completions per prompt.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from sharpen.errors import InputError


@dataclass(frozen=True)
class Auroc:
    """Areas under the ROC curve of one reward.

    Attributes:
        mean: Mean of the prompts' areas, each prompt alike; NaN where none has one.
        pooled: Share of all pairs of all prompts that are in order, each pair alike.
        n_prompts: Prompts that have an area: with a right and a wrong completion.
        auroc_P: Area of each prompt, NaN where it has none.
        n_pairs_P: Pairs of a right and a wrong completion of each prompt.
    """

    mean: float
    pooled: float
    n_prompts: int
    auroc_P: Float64[np.ndarray, " P"]
    n_pairs_P: Int64[np.ndarray, " P"]


def within_prompt_auroc(
    reward_PG: Float64[np.ndarray, "P G"],
    # their shapes are checked below, with a message
    correct_PG: Bool[np.ndarray, "..."],
    valid_PG: Bool[np.ndarray, "..."] | None = None,
) -> Auroc:
    """Chance that a right completion of a prompt has a higher reward than a wrong one.

        auroc[p] = mean over right i, wrong j of p of  1[r_i > r_j] + 1[r_i = r_j] / 2

    0.5 is a coin, 1 always right. Prompts whose completions are all right, or all wrong, have no
    pair and are left out, and so are completions that are not valid or whose reward is NaN: a
    choice never sees them.

    Args:
        reward_PG: Higher is better; infinities are ordered as they are.
        correct_PG: Grades.
        valid_PG: Which completions may be chosen; default: all.

    Raises:
        InputError: If the arrays are of different shapes.

    Source:
        Taubenfeld et al. 2025 (CISC), arXiv:2502.06233, within-question discrimination: `pooled`.

    Example:
        >>> reward_PG = np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 5.0]])
        >>> correct_PG = np.array([[True, False, True], [True, True, True]])
        >>> found = within_prompt_auroc(reward_PG, correct_PG)
        >>> found.mean, found.n_prompts  # 3 > 2, 1 < 2; the second prompt has nothing wrong
        (0.5, 1)
    """
    for name, given_PG in (("correct_PG", correct_PG), ("valid_PG", valid_PG)):
        if given_PG is not None and given_PG.shape != reward_PG.shape:
            raise InputError(
                f"`{name}` must be of the shape of `reward_PG`, {reward_PG.shape}, "
                f"got {given_PG.shape}."
            )
    may_PG = ~np.isnan(reward_PG)
    if valid_PG is not None:
        may_PG = may_PG & valid_PG
    P = len(reward_PG)
    won_P, n_pairs_P = np.zeros(P), np.zeros(P, dtype=np.int64)
    for p in range(P):
        right, wrong = (reward_PG[p, may_PG[p] & c] for c in (correct_PG[p], ~correct_PG[p]))
        wrong = np.sort(wrong)
        # wrong ones below each right one, and below or beside it
        below, beside = (np.searchsorted(wrong, right, side) for side in ("left", "right"))
        won_P[p] = (below.sum() + beside.sum()) / 2
        n_pairs_P[p] = len(right) * len(wrong)
    auroc_P = np.full(P, np.nan)
    np.divide(won_P, n_pairs_P, out=auroc_P, where=n_pairs_P > 0)
    has_area = n_pairs_P > 0
    n_prompts, n_pairs = int(has_area.sum()), int(n_pairs_P.sum())
    return Auroc(
        mean=float(auroc_P[has_area].mean()) if n_prompts else float("nan"),
        pooled=float(won_P.sum() / n_pairs) if n_pairs else float("nan"),
        n_prompts=n_prompts,
        auroc_P=auroc_P,
        n_pairs_P=n_pairs_P,
    )
