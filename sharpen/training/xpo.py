"""Numbers of XPO beside its loss (`losses.xpo_loss`).

    optimism_weight      the weight of the loss's second term, alpha (V + R)^2
    proof_alpha          the alpha of the proof
    regularised_value    what KL-regularised sharpening maximises, from a policy's own samples

N completions.
"""

import math

from jaxtyping import Bool, Float64
from torch import Tensor

from .losses import check_beta, check_lengths, check_optimism, check_rounds


def optimism_weight(alpha: float, value_bound: float, reward_bound: float) -> float:
    """Weight of XPO's optimism on the scale of the squared loss.

        alpha (V + R)^2

    Args:
        alpha: The algorithm's, at least 0 and finite; of the proof, `proof_alpha`.
        value_bound: V >= |beta log pi / pi_base|, of both completions of a pair.
        reward_bound: R >= log 1 / pi_base.

    Raises:
        InputError: If one is negative, NaN or infinite.

    Source:
        Huang et al. 2024, arXiv:2412.01951, appendix J.2.

    Example:
        >>> optimism_weight(0.001, 4.0, 6.0)
        0.1
    """
    check_optimism("alpha", alpha)
    check_optimism("value_bound", value_bound)
    check_optimism("reward_bound", reward_bound)
    return alpha * (value_bound + reward_bound) ** 2


def proof_alpha(
    exploration: float, beta: float, value_bound: float, reward_bound: float, rounds: int
) -> float:
    """The proof's alpha, which makes the weight grow as V + R and fall with the rounds.

        alpha = beta / (V + R)  c / sqrt(T),     c = sqrt(log(2 |Pi| T / rho) / SEC(Pi))

    so that alpha (V + R)^2 = beta (V + R) c / sqrt(T). Of a linear softmax of d dimensions log |Pi|
    and SEC are both near d log T, and c near 1 (`experiments.theory`). Of a neural network neither
    is known. The proof draws one pair a round. Where a round draws m, its argument goes through
    with log |Pi| / m + 1 in place of log |Pi|, and many pairs a round ask for a c that is smaller,
    down to 1 / sqrt(SEC). With few rounds c = 1 outweighs the squares.

    Args:
        exploration: c, at least 0 and finite.
        beta: Weight of the KL term, above 0 and finite.
        value_bound: V, at least 0.
        reward_bound: R, at least 0; V + R above 0, or alpha is 0.
        rounds: T, at least 1.

    Raises:
        InputError: If one is not as above.

    Source:
        Huang et al. 2024, arXiv:2412.01951, theorem 4.3 and appendix J.2. What is said of m pairs a
        round is our own reading of its proof, not a theorem of the paper.

    Example:
        >>> proof_alpha(1.0, 0.5, 4.0, 6.0, 25)
        0.01
    """
    check_beta(beta)
    check_optimism("exploration", exploration)
    check_optimism("value_bound", value_bound)
    check_optimism("reward_bound", reward_bound)
    check_rounds(rounds)
    bound = value_bound + reward_bound
    return 0.0 if bound == 0 else beta / bound * exploration / math.sqrt(rounds)


def regularised_value(
    reward: Float64[Tensor, " N"],
    log_ratio: Float64[Tensor, " N"],
    eligible: Bool[Tensor, " N"],
    *,
    beta: float,
) -> float:
    """Mean reward less beta times the divergence from the base model, in units of the reward.

        J_beta(pi) = E_{y ~ pi} [r(y) - beta (log pi(y) - log pi_base(y))]

    Unbiased over samples of pi at temperature 1, but for those that are not eligible, which it
    leaves out. NaN where none is.

    Args:
        reward: Of completions drawn from pi.
        log_ratio: log pi - log pi_base of each, in nats.
        eligible: Which completions count.
        beta: Weight of the divergence, above 0 and finite.

    Raises:
        InputError: If `beta` is not as above, or the lengths differ.

    Source:
        Huang et al. 2024, arXiv:2412.01951, Eq. (3) and the last line of Algorithm 1.

    Example:
        >>> import torch
        >>> reward = torch.tensor([-1.0, -3.0, -99.0], dtype=torch.float64)
        >>> log_ratio = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
        >>> eligible = torch.tensor([True, True, False])
        >>> regularised_value(reward, log_ratio, eligible, beta=2.0)
        -3.0
    """
    check_beta(beta)
    check_lengths(reward=reward, log_ratio=log_ratio, eligible=eligible)
    return float((reward - beta * log_ratio)[eligible].mean())
