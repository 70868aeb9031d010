"""What the paper's bounds depend on: coverage, margin, and how sharpened a policy is.

Pure functions of log-probs of y*(x), one a prompt; expectations are means over the prompts given.

P prompts. Log-probabilities are nats.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64

from sharpen.errors import InputError, check_value


def coverage(logprob: Float64[np.ndarray, " P"], *, power: float = 1.0) -> float:
    """The coverage coefficient: samples that it takes, in the mean, to meet y* once.

        C_cov = (E_x[ pi(y*(x)|x)^-power ])^(1 / power)

    Args:
        logprob: log pi(y*|x) gives C_cov; log pi(y*_gamma|x), the mass of all completions within
            (1 - gamma) of the best, gives C_cov,gamma; log max_y pi(y|x) gives the coefficient of
            the adaptive rule, which is larger where y* is a set.
        power: p of C_cov,gamma,p; 1 is the paper's default.

    Returns:
        At least 1; inf where y* of a prompt has no mass.

    Source:
        Huang et al. 2024, arXiv:2412.01951, section 3.1 and appendix F.

    Example:
        >>> coverage(np.log([0.5, 0.25, 1.0]))
        2.3333333333333335
    """
    _check_logprobs("logprob", logprob)
    check_value("power", power, 0 < power < math.inf, "positive and finite")
    with np.errstate(over="ignore"):
        return float(np.mean(np.exp(-power * logprob)) ** (1 / power))


def mass_within(logprobs: Sequence[float], gamma: float = 0.0, *, tolerance: float = 1e-4) -> float:
    """pi(y*_gamma|x): probability of all completions within (1 - gamma) of the best.

        y*_gamma(x) = { y : pi(y|x) >= (1 - gamma) max_y' pi(y'|x) }

    Args:
        logprobs: Of the most probable completions of a prompt; those further down do not count.
        gamma: In [0, 1); 0 is pi(y*|x) itself, summed over y* where it is not unique.
        tolerance: What the log-probs are good for, in nats.

    Source:
        Huang et al. 2024, arXiv:2412.01951, definition F.1.

    Example:
        >>> mass_within([math.log(0.5), math.log(0.25), math.log(0.125)], gamma=0.5)
        0.75
    """
    check_value("gamma", gamma, 0 <= gamma < 1, "in [0, 1)")
    if not logprobs:
        raise InputError("`logprobs` must hold at least one completion, got none.")
    level = max(logprobs) + math.log1p(-gamma) - tolerance
    return math.fsum(math.exp(x) for x in logprobs if x >= level)


def margin(
    logprob: Float64[np.ndarray, " P"], runner_up: Float64[np.ndarray, " _"]
) -> Float64[np.ndarray, " P"]:
    """How far y* stands out from every other completion, per prompt.

        gamma_margin(x) = pi(y*|x) / max_{y not y*} pi(y|x) - 1

    The paper's gamma_margin is the smallest over prompts.

    Args:
        logprob: log pi(y*|x).
        runner_up: Log-prob of the best completion that is not y*; -inf if there is none.

    Returns:
        0 where y* is not unique; inf where there is no other completion.

    Source:
        Huang et al. 2024, arXiv:2412.01951, assumption 4.2.

    Example:
        >>> margin(np.log([0.5, 0.3]), np.log([0.25, 0.3]))
        array([1., 0.])
    """
    _check_logprobs("logprob", logprob)
    if logprob.shape != runner_up.shape:
        raise InputError(
            f"`runner_up` must hold one number for each of P={len(logprob)} prompts, "
            f"got {len(runner_up)}."
        )
    if not (runner_up <= logprob).all():
        (bad,) = np.nonzero(~(runner_up <= logprob))
        raise InputError(
            f"`runner_up` must be at most `logprob`, got {runner_up[bad[0]]} against "
            f"{logprob[bad[0]]} for prompt {bad[0]}."
        )
    with np.errstate(over="ignore"):
        return np.expm1(logprob - runner_up)


def unsharpened(logprob: Float64[np.ndarray, " P"], delta: float) -> float:
    """eps: the share of prompts on which a policy is not yet delta-sharpened.

        eps = P_x[ pihat(y*(x)|x) < 1 - delta ]

    pihat is (eps, delta)-sharpened for this eps and for none smaller.

    Args:
        logprob: log pihat(y*(x)|x), where y* is that of the base model; its mass of y*_gamma
            makes it (eps, delta, gamma)-sharpened.
        delta: In (0, 1).

    Source:
        Huang et al. 2024, arXiv:2412.01951, definitions 3.1 and F.1.

    Example:
        >>> unsharpened(np.log([0.9, 0.5, 0.2, 1.0]), delta=0.5)
        0.25
    """
    _check_logprobs("logprob", logprob)
    check_share("delta", delta)
    # a sum of logs that should be log(1 - delta) may be off by rounding
    return float(np.mean(logprob < math.log1p(-delta) - 1e-12))


def greedy_must_find(logprob: Float64[np.ndarray, " P"]) -> Bool[np.ndarray, " P"]:
    """Prompts on which greedy decoding returns y*, whatever else the model says.

        pi(y*|x) > 1/2

    Each conditional probability along y* is at least the whole one, so each token of y* is the
    most probable one. At 1/2 and below greedy may find y* or not.

    Source:
        Huang et al. 2024, arXiv:2412.01951, proposition 3.1.

    Example:
        >>> greedy_must_find(np.log([0.51, 0.5, 0.9]))
        array([ True, False,  True])
    """
    _check_logprobs("logprob", logprob)
    return logprob > math.log(0.5)


def check_share(name: str, value: float) -> None:
    """Reject a probability of 0, 1 or outside."""
    check_value(name, value, 0 < value < 1, "in (0, 1)")


def _check_logprobs(name: str, value: np.ndarray) -> None:
    if len(value) == 0:
        raise InputError(f"`{name}` must hold at least one prompt, got none.")
    # fp32 sums of a certain completion come out a little above 0
    if not (value <= 1e-5).all():
        (bad,) = np.nonzero(~(value <= 1e-5))
        raise InputError(
            f"`{name}` must be at most 0 nats, got {value[bad[0]]} for prompt {bad[0]}."
        )
