"""How far two engines' log-probs of the same tokens are apart, and what that does to a ratio.

    d[s] = ours[s] - theirs[s],   r[s] = exp(d[s]) = p_ours / p_theirs

With tokens drawn from `theirs` (the sampler) and `ours` the trainer, r is the importance ratio of
off-policy training, and

    k1 = mean(-d),   k3 = mean(r - 1 - d)

both estimate KL(theirs || ours), k3 with less variance and never below 0 (Schulman 2020,
"Approximating KL divergence"). A token with |r - 1| > clip is one that PPO's clip acts on, though
not a step was taken. S tokens, N completions.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sharpen.errors import InputError

Measure = Literal["max", "mean", "p99"]
Nested = Sequence[Sequence[Sequence[float]]]

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
# edges of |d| in nats: below what fp32 resolves, ..., above what any rounding does
EDGES = (0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))


@dataclass(frozen=True)
class Place:
    """One token: completion g of prompt p, position t in it."""

    p: int
    g: int
    t: int


@dataclass(frozen=True, eq=False)
class Pairs:
    """Log-probs of the same tokens, flat.

    Attributes:
        ours: fp64 [S], nats.
        theirs: fp64 [S], nats.
        owner: int64 [S]: which completion, counted over all prompts.
        places: S of them.
        n_completions: N, empty ones too.
    """

    ours: np.ndarray
    theirs: np.ndarray
    owner: np.ndarray
    places: list[Place]
    n_completions: int

    @property
    def difference(self) -> np.ndarray:
        """d, fp64 [S]; 0 where both are the same infinity, NaN where either is NaN."""
        same = self.ours == self.theirs
        with np.errstate(invalid="ignore"):
            return np.where(same, 0.0, self.ours - self.theirs)


def pair(ours: Nested, theirs: Nested) -> Pairs:
    """Put the log-probs of two engines beside each other.

    Args:
        ours: Of each token of each completion of each prompt, nats.
        theirs: The same of another engine.

    Raises:
        InputError: If they are not of the same tokens.
    """
    rows: list[tuple[float, float, int, Place]] = []
    n = 0
    lengths = [[[len(tokens) for tokens in group] for group in side] for side in (ours, theirs)]
    if lengths[0] != lengths[1]:
        raise InputError(
            "the two engines must rate the same tokens, got other numbers of log-probs; were the "
            "samples tokenised by another tokenizer?"
        )
    for p, groups in enumerate(zip(ours, theirs, strict=True)):
        for g, (one, other) in enumerate(zip(*groups, strict=True)):
            rows += [
                (a, b, n, Place(p, g, t)) for t, (a, b) in enumerate(zip(one, other, strict=True))
            ]
            n += 1
    return Pairs(
        np.array([row[0] for row in rows], dtype=np.float64),
        np.array([row[1] for row in rows], dtype=np.float64),
        np.array([row[2] for row in rows], dtype=np.int64),
        [row[3] for row in rows],
        n,
    )


def compare(pairs: Pairs, *, clip: float = 0.2) -> dict[str, Any]:
    """The comparison in numbers, ready for JSON.

    Tokens that either engine calls NaN are counted (`n_nan`, and `n_nan_one_side`) and left out.
    Infinite differences stay: they are a maximum that no tolerance holds.

    Args:
        pairs: At least one token.
        clip: PPO's epsilon.

    Raises:
        InputError: If there is nothing to compare, or `clip` is not positive.
    """
    if clip <= 0:
        raise InputError(f"`clip` must be positive, got {clip}.")
    nan_ours, nan_theirs = np.isnan(pairs.ours), np.isnan(pairs.theirs)
    known = ~(nan_ours | nan_theirs)
    if not known.any():
        raise InputError(
            f"there must be a token to compare, got {len(known)}, all of them NaN."
            if len(known)
            else "there must be a token to compare, got empty completions."
        )
    d = pairs.difference[known]
    size = np.abs(d)
    sums = np.bincount(pairs.owner[known], weights=d, minlength=pairs.n_completions)
    # an impossible token makes them infinite; numpy's warnings say no more than the numbers do
    with np.errstate(over="ignore", invalid="ignore"):
        ratio = np.exp(d)
        k3 = np.where(np.isinf(d), np.inf, ratio - 1 - d)
        return {
            "n_tokens": int(known.sum()),
            "n_completions": pairs.n_completions,
            "n_nan": int((~known).sum()),
            "n_nan_one_side": int((nan_ours ^ nan_theirs).sum()),
            "max": float(size.max()),
            "mean": float(size.mean()),
            "signed_mean": float(d.mean()),
            "rms": float(np.sqrt((d**2).mean())),
            "percentiles": {f"p{q:g}": _percentile(size, q) for q in PERCENTILES},
            "histogram": _histogram(size),
            "completion_max": float(np.abs(sums).max()),
            "completion_mean": float(np.abs(sums).mean()),
            "ratio": {
                "min": float(ratio.min()),
                "max": float(ratio.max()),
                "clip": clip,
                "outside_clip": float((np.abs(ratio - 1) > clip).mean()),
                "k1": float(-d.mean()),
                "k3": float(k3.mean()),
            },
        }


def worst(pairs: Pairs, k: int) -> list[int]:
    """Indices of the k tokens furthest apart, furthest first; NaN on one side before all.

    Tokens that both engines call NaN, or that agree to the bit, are not among them.
    """
    size = np.abs(pairs.difference)
    one_side = np.isnan(pairs.ours) ^ np.isnan(pairs.theirs)
    size = np.where(one_side, np.inf, np.nan_to_num(size, nan=0.0, posinf=np.inf))
    # by size, then by place, so that a report does not depend on the sort
    order = np.lexsort((np.arange(len(size)), ~one_side, -size))
    return [int(i) for i in order[:k] if size[i] > 0]


def is_within(found: dict[str, Any], tolerance: float, measure: Measure) -> bool:
    """Whether `measure` of the differences is at most `tolerance`, and no NaN is on one side."""
    value = found["percentiles"]["p99"] if measure == "p99" else found[measure]
    return bool(value <= tolerance) and found["n_nan_one_side"] == 0


def _percentile(size: np.ndarray, q: float) -> float:
    # a value that occurs, also among infinite ones
    return float(np.percentile(size, q, method="inverted_cdf"))


def _histogram(size: np.ndarray) -> list[dict[str, Any]]:
    """Tokens by decade: [low, high), the first of exactly 0 alone."""
    rows = [{"from": 0.0, "to": 0.0, "n": int((size == 0).sum())}]
    for low, high in itertools.pairwise(EDGES):
        inside = (size > 0) & (size >= low) & ((size < high) | (high == np.inf))
        rows.append({"from": low, "to": high, "n": int(inside.sum())})
    return rows
