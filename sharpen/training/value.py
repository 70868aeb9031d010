"""What KL-regularised sharpening maximises, estimated from a policy's own samples.

N completions.
"""

from jaxtyping import Bool, Float64
from torch import Tensor

from .checks import check_beta, check_lengths


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
