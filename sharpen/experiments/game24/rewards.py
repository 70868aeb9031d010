"""Whether the self-rewards follow the true reward, within prompts: AUROC and covariance.

To first order sharpening changes a prompt's accuracy by the covariance of the two: with
p_alpha ~ p^alpha

    d/d alpha P_alpha(correct | x) = Cov_alpha(1[correct], log p(y | x)),

so the sign of the covariance under the model (alpha = 1) says whether a little sharpening helps the
prompt, and that under p_alpha whether more of it still does. P prompts, G completions per prompt.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64

from sharpen.evaluation.metrics import (
    MAJORITY,
    Outcome,
    all_votes,
    bootstrap_ci95,
    ci95,
    resample_means,
    within_prompt_auroc,
)
from sharpen.evaluation.summary import rounded
from sharpen.records import Row

POWERS = (1.0, 2.0, 4.0)
Vector = Float64[np.ndarray, " P"]


def auroc_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """AUROC of every reward within prompts, means over seeds, best first; a band over prompts.

    Args:
        outcomes: One a seed, of the same prompts.
    """
    rows = []
    for reward in outcomes[0].rewards:
        found = []
        for outcome in outcomes:
            assert outcome.correct_PG is not None
            value_PG = reward_of(outcome, reward)
            found.append(within_prompt_auroc(value_PG, outcome.correct_PG, outcome.valid_PG))
        auroc_PS = np.stack([x.auroc_P for x in found], axis=1)
        row: Row = {
            "reward": reward,
            "auroc": rounded(float(np.mean([x.mean for x in found]))),
            "ci95": _band_of_mean_areas(auroc_PS),
            "pooled": rounded(float(np.mean([x.pooled for x in found]))),
            "by_seed": [rounded(x.mean) for x in found],
            "prompts": int(np.mean([x.n_prompts for x in found])),
        }
        rows.append(row)
    return sorted(rows, key=lambda row: -(row["auroc"] or 0.0))


def _band_of_mean_areas(auroc_PS: Float64[np.ndarray, "P S"]) -> list[float | None] | None:
    """Band, over prompts, of the mean over seeds of the mean area; NaN where a prompt has none."""
    has_PS = ~np.isnan(auroc_PS)
    if not has_PS.any(axis=0).all():
        return None
    S = auroc_PS.shape[1]
    sums_BM = resample_means(np.hstack([np.where(has_PS, auroc_PS, 0.0), has_PS]))
    # resamples in which no prompt of a seed has an area have no mean
    sums_BM = sums_BM[(sums_BM[:, S:] > 0).all(axis=1)]
    return [rounded(x) for x in ci95((sums_BM[:, :S] / sums_BM[:, S:]).mean(axis=1))]


def covariance_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Covariance of true and self reward within prompts, for every reward.

    `per_sd` divides it by the reward's deviation within prompts, root mean square over prompts:
    points of accuracy per deviation, which rewards of any unit can be compared by.

    Args:
        outcomes: One a seed, of the same prompts.
    """
    rows = []
    for reward in outcomes[0].rewards:
        parts = [_moments(outcome, reward) for outcome in outcomes]
        cov_P = _nanmean(np.stack([cov_P for cov_P, _ in parts]))
        variance = float(np.nanmean([variance_P for _, variance_P in parts]))
        known_P = cov_P[~np.isnan(cov_P)]
        varied_P = known_P[known_P != 0]
        per_sd = 100 * float(known_P.mean()) / math.sqrt(variance) if variance > 0 else math.nan
        rows.append(
            {
                "reward": reward,
                "mean": rounded(float(known_P.mean())),
                "ci95": [rounded(x) for x in bootstrap_ci95(known_P)],
                "per_sd_points": rounded(per_sd),
                "share_positive": rounded(float((varied_P > 0).mean())) if len(varied_P) else None,
                "prompts": len(varied_P),
            }
        )
    return sorted(rows, key=lambda row: -(row["per_sd_points"] or 0.0))


def power_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Covariance with log p under p^alpha, by self-normalised weights p^(alpha - 1) of the samples.

    `effective_samples` is how many samples the weights of a prompt are worth, mean over prompts.
    """
    rows = []
    for alpha in POWERS:
        parts = [tilted_covariance(outcome, alpha) for outcome in outcomes]
        cov_P = _nanmean(np.stack([cov_P for cov_P, _, _ in parts]))
        known_P = cov_P[~np.isnan(cov_P)]
        rows.append(
            {
                "alpha": alpha,
                "accuracy": rounded(float(np.nanmean([a_P for _, a_P, _ in parts]))),
                "mean": rounded(float(known_P.mean())),
                "ci95": [rounded(x) for x in bootstrap_ci95(known_P)],
                "effective_samples": rounded(float(np.nanmean([n_P for _, _, n_P in parts]))),
            }
        )
    return rows


def prompt_rows(outcomes: Sequence[Outcome], ids: Sequence[str]) -> list[Row]:
    """Accuracy of one sample and covariance with log p of each prompt, means over seeds."""
    cov_P = _nanmean(np.stack([_moments(outcome, "logprob")[0] for outcome in outcomes]))
    grades = [x.correct_PG for x in outcomes if x.correct_PG is not None]
    accuracy_P = np.mean([correct_PG.mean(axis=1) for correct_PG in grades], axis=0)
    return [
        {"prompt_id": name, "accuracy": rounded(accuracy), "covariance": rounded(cov)}
        for name, accuracy, cov in zip(ids, accuracy_P.tolist(), cov_P.tolist(), strict=True)
    ]


def tilted_covariance(outcome: Outcome, alpha: float) -> tuple[Vector, Vector, Vector]:
    """Covariance of grade and log p under p^alpha, accuracy there, effective samples; NaN: none.

    Example:
        >>> logprob_PG = np.log(np.array([[0.2, 0.8]]))
        >>> outcome = Outcome(
        ...     {"logprob": logprob_PG}, np.array([[True, True]]), np.array([[False, True]])
        ... )
        >>> cov_P, accuracy_P, _ = tilted_covariance(outcome, 1.0)
        >>> round(float(cov_P[0]), 4), float(accuracy_P[0])  # log 4 / 4
        (0.3466, 0.5)
    """
    logprob_PG = outcome.reward_PG["logprob"]
    assert outcome.correct_PG is not None
    counts_PG = outcome.valid_PG & np.isfinite(logprob_PG)
    tilt_PG = np.where(counts_PG, (alpha - 1) * logprob_PG, -np.inf)
    with np.errstate(invalid="ignore"):
        weight_PG = np.exp(tilt_PG - tilt_PG.max(axis=1, keepdims=True))
        weight_PG /= weight_PG.sum(axis=1, keepdims=True)
    value_PG = np.where(counts_PG, logprob_PG, 0.0)
    accuracy_P = (weight_PG * outcome.correct_PG).sum(axis=1)
    mean_P = (weight_PG * value_PG).sum(axis=1)
    both_P = (weight_PG * value_PG * outcome.correct_PG).sum(axis=1)
    return both_P - accuracy_P * mean_P, accuracy_P, 1 / (weight_PG**2).sum(axis=1)


def reward_of(outcome: Outcome, reward: str) -> Float64[np.ndarray, "P G"]:
    """A reward by name; that of a majority vote is the number of votes."""
    return all_votes(outcome) if reward == MAJORITY else outcome.reward_PG[reward]


def _moments(
    outcome: Outcome, reward: str
) -> tuple[Float64[np.ndarray, " P"], Float64[np.ndarray, " P"]]:
    """Covariance with the grade, and variance of the reward, of each prompt; NaN where unknown."""
    assert outcome.correct_PG is not None
    value_PG = reward_of(outcome, reward)
    counts_PG = outcome.valid_PG & np.isfinite(value_PG)
    value_PG = np.where(counts_PG, value_PG, np.nan)
    grade_PG = np.where(counts_PG, outcome.correct_PG, np.nan)
    centred_PG = value_PG - _nanmean(value_PG.T)[:, None]
    return (
        _nanmean((centred_PG * (grade_PG - _nanmean(grade_PG.T)[:, None])).T),
        _nanmean((centred_PG**2).T),
    )


def _nanmean(value_AB: Float64[np.ndarray, "A B"]) -> Float64[np.ndarray, " B"]:
    """Mean over the first axis of what is not NaN; NaN where all is."""
    known_AB: Bool[np.ndarray, "A B"] = ~np.isnan(value_AB)
    n_B = known_AB.sum(axis=0)
    total_B = np.where(known_AB, value_AB, 0.0).sum(axis=0)
    return np.where(n_B > 0, total_B / np.maximum(n_B, 1), np.nan)
