"""From the y* of every prompt to the numbers of `theory.json` and a short table.

Everything but `coverage` and `n_*` is over the prompts whose y* is proved. P prompts. Nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from sharpen.evaluation.metrics import bootstrap_ci95

from .best_of_n import (
    certified_by,
    fixed_n,
    miss_probability,
    mu_of,
    necessary_n,
    stopping,
    sufficient_n,
)
from .coverage import coverage, greedy_must_find, margin, mass_within, unsharpened

# of best-of-N and of a capped adaptive rule: where to say what they miss; chosen
SIZES = (1, 2, 5, 10, 25, 50, 100)


@dataclass(frozen=True)
class Known:
    """What is known of one prompt; see `search.Mode` for the first seven.

    Attributes:
        logprobs: Of the listed completions, most probable first; at least one.
        bound: No other completion has a larger log-prob.
        proved: The first listed is y*.
        complete: The list is complete down to its end.
        n_expanded: Prefixes that it took.
        cut_bound: No cut completion met has a larger log-prob.
        rounding: Largest difference between two computations of a listed log-prob, in nats.
        greedy_found: Whether greedy decoding returned y*.
        policy_logprobs: Of the listed completions under the policy to be judged, or None.
    """

    logprobs: Sequence[float]
    bound: float
    proved: bool
    complete: bool
    n_expanded: int
    cut_bound: float
    rounding: float
    greedy_found: bool
    policy_logprobs: Sequence[float] | None = None


def findings(known: Sequence[Known], *, gamma: float, deltas: Sequence[float]) -> dict[str, Any]:
    """All quantities of the theory that the prompts give, as JSON values (inf is None).

    Args:
        known: One a prompt, at least one.
        gamma: Of y*_gamma; lists go down to it where they are complete.
        deltas: Miss rates at which to say what best-of-N and the adaptive rule need.
    """
    proved = [x for x in known if x.proved]
    result: dict[str, Any] = {
        "n_prompts": len(known),
        "n_proved": len(proved),
        "n_complete": sum(x.complete for x in known),
        "n_expanded": {
            "mean": float(np.mean([x.n_expanded for x in known])),
            "max": max(x.n_expanded for x in known),
        },
        "rounding": max(x.rounding for x in known),
        "coverage": _coverage(known, gamma),
    }
    if not proved:
        return result
    star_P = np.log([mass_within(x.logprobs) for x in proved])
    ci95 = bootstrap_ci95(star_P) if len(proved) > 1 else (math.nan, math.nan)
    result["logprob"] = {"mean": float(star_P.mean()), "ci95": [finite_or_none(x) for x in ci95]}
    result["n_best_at_any_length"] = sum(x.cut_bound < x.logprobs[0] for x in proved)
    must_P = greedy_must_find(star_P)
    found_P = np.array([x.greedy_found for x in proved])
    result["greedy"] = {
        "n_must_find": int(must_P.sum()),
        "n_found_of_those": int((must_P & found_P).sum()),
        "n_found": int(found_P.sum()),
    }
    result["margin"] = _margin(proved)
    p_P = np.exp(star_P)
    # what best-of-N misses, and proposition C.1's bound of it
    result["miss_by_n"] = {
        str(n): [
            float(np.mean([miss_probability(x, n) for x in star_P.tolist()])),
            float(np.exp(-n * p_P).mean()),
        ]
        for n in SIZES
    }
    result["best_of_n"] = {str(delta): _best_of_n(star_P, delta) for delta in deltas}
    result["adaptive"] = {str(delta): _adaptive(proved, star_P, delta) for delta in deltas}
    if all(x.policy_logprobs is not None for x in proved):
        result["policy"] = _policy(proved, gamma, deltas)
    return result


def format_table(found: dict[str, Any]) -> str:
    """A few lines for people."""
    low, high = (math.inf if x is None else x for x in found["coverage"]["c_cov"])
    expanded = found["n_expanded"]
    lines = [
        f"y* proved            {found['n_proved']} of {found['n_prompts']} prompts, "
        f"{expanded['mean']:.0f} prefixes in the mean, {expanded['max']} at most",
        "C_cov = E[1/pi(y*)]  " + (f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"),
    ]
    if "logprob" not in found:
        return "\n".join(lines)
    greedy, margins = found["greedy"], found["margin"]
    lines += [
        f"log pi(y*), nats     {found['logprob']['mean']:.4f} in the mean",
        f"pi(y*) > 1/2         {greedy['n_must_find']} prompts; greedy finds y* on "
        f"{greedy['n_found_of_those']} of them, on {greedy['n_found']} of all",
    ]
    if margins.get("smallest") is not None:
        lines.append(
            f"gamma_margin         {margins['smallest']:.3g} smallest, "
            f"{margins['median'] or math.inf:.3g} median"
        )
    for delta, rule in found["adaptive"].items():
        lines.append(
            f"delta {delta:14s} adaptive rule: {rule['expected_n'][1]:.4g} samples, misses y* "
            f"{rule['miss'][1]:.3%}; fixed N as good: {rule['fixed_n']['equal_miss']}, "
            f"of equal guarantee: {rule['fixed_n']['guarantee_on_each']}"
        )
    if "policy" in found:
        eps = ", ".join(
            f"({value:.3g}, {delta})" for delta, value in found["policy"]["eps"].items()
        )
        lines.append(f"policy is (eps, delta)-sharpened for {eps}")
    return "\n".join(lines)


def _coverage(known: Sequence[Known], gamma: float) -> dict[str, Any]:
    """C_cov as an interval: an unproved prompt's best lies between what was found and its bound."""
    found_P = np.array([math.log(mass_within(x.logprobs)) for x in known])
    # of an unproved prompt no set is known: its best may have up to all the mass
    most_P = np.where([x.proved for x in known], found_P, 0.0)
    worst_P = np.array([x.logprobs[0] for x in known])
    within_P = np.array([math.log(mass_within(x.logprobs, gamma)) for x in known])
    least_P = np.where([x.proved for x in known], found_P, worst_P)
    interval = [coverage(most_P), coverage(least_P)]
    result: dict[str, Any] = {"c_cov": [finite_or_none(x) for x in interval]}
    # the sum over y*_gamma needs the whole list
    if all(x.proved and x.complete for x in known):
        result["c_cov_gamma"] = {"gamma": gamma, "value": finite_or_none(coverage(within_P))}
        result["c_cov_adaptive"] = finite_or_none(coverage(worst_P))
    return result


def _margin(proved: Sequence[Known]) -> dict[str, Any]:
    """How far y* stands out, over the prompts whose runner-up is known."""
    whole = [x for x in proved if x.complete]
    if not whole:
        return {}
    best_P = np.array([x.logprobs[0] for x in whole])
    second_P = np.array([x.logprobs[1] if len(x.logprobs) > 1 else -math.inf for x in whole])
    margin_P = margin(best_P, second_P)
    return {
        "n": len(whole),
        "smallest": finite_or_none(float(margin_P.min())),
        "median": finite_or_none(float(np.median(margin_P))),
    }


def _best_of_n(star: Float64[np.ndarray, " P"], delta: float) -> dict[str, Any]:
    """Samples for a miss rate of delta, on each prompt and one number for all."""
    least = [necessary_n(x, delta) for x in star.tolist()]
    enough = [sufficient_n(x, delta) for x in star.tolist()]
    return {
        "n_necessary": {"mean": float(np.mean(least)), "max": max(least)},
        "n_sufficient": {"mean": float(np.mean(enough)), "max": max(enough)},
        "fixed_n": fixed_n(star, delta),
    }


def _adaptive(
    proved: Sequence[Known], star: Float64[np.ndarray, " P"], delta: float
) -> dict[str, Any]:
    """What the adaptive rule takes and misses, and the fixed N that are as good."""
    mu = mu_of(delta)
    # in a list that is not complete only what lies above the bound is known to be all
    laws = [[p for p in x.logprobs if x.complete or p > x.bound] for x in proved]
    rules = [stopping(law, mu) for law in laws]
    miss = [float(np.mean([getattr(r, f"miss_{side}") for r in rules])) for side in ("low", "high")]
    needed = [
        float(np.mean([getattr(r, f"expected_{side}") for r in rules])) for side in ("low", "high")
    ]
    guarantee = math.exp(-mu)
    fixed = {
        "equal_miss": fixed_n(star, miss[1]) if 0 < miss[1] < 1 else None,
        "guarantee_in_the_mean": fixed_n(star, guarantee),
        "guarantee_on_each": max(necessary_n(x, guarantee) for x in star.tolist()),
    }
    return {
        "mu": mu,
        "miss": miss,
        "largest_miss": max(r.miss_high for r in rules),
        "expected_n": needed,
        # of one N for all prompts
        "fixed_n": fixed,
        "factor_saved": {k: None if n is None else n / needed[1] for k, n in fixed.items()},
        # at least so many prompts have stopped by then
        "certified_by": {
            str(cap): float(np.mean([certified_by(law, mu, cap) for law in laws])) for cap in SIZES
        },
    }


def _policy(proved: Sequence[Known], gamma: float, deltas: Sequence[float]) -> dict[str, Any]:
    """How sharpened the policy is, by its mass of y* and of y*_gamma."""
    star_P, within_P = [], []
    for x in proved:
        assert x.policy_logprobs is not None
        for into, share in ((star_P, 0.0), (within_P, gamma)):
            level = x.logprobs[0] + math.log1p(-share) - 1e-4
            pairs = zip(x.logprobs, x.policy_logprobs, strict=True)
            mass = math.fsum(math.exp(policy) for base, policy in pairs if base >= level)
            into.append(math.log(mass) if mass > 0 else -math.inf)
    star_P, within_P = np.array(star_P), np.array(within_P)
    return {
        "logprob_mean": finite_or_none(float(star_P.mean())),
        "eps": {str(delta): unsharpened(star_P, delta) for delta in deltas},
        "eps_gamma": {str(delta): unsharpened(within_P, delta) for delta in deltas},
    }


def finite_or_none(x: float) -> float | None:
    """What JSON can say of a number."""
    return x if math.isfinite(x) else None
