"""Rewards of the distributions before each token: how far they lean on few tokens.

S scored tokens, N completions; completion n owns the tokens offsets[n] ... offsets[n + 1] - 1.
"""

from jaxtyping import Float32, Int64
from torch import Tensor

from .likelihood import mean_of_tokens


def mean_self_certainty(
    self_certainty: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Mean divergence of the model's distributions from the uniform one, in nats.

        reward[n] = sum_s KL(uniform || p_s) / length[n]

    Looks at the distributions before each token and not at the token drawn. Nearly free of length.

    Source:
        Kang, Zhao and Song 2025, arXiv:2502.18581.

    Example:
        >>> import torch
        >>> mean_self_certainty(torch.tensor([2.0, 4.0]), torch.tensor([0, 2]))
        tensor([3.])
    """
    return mean_of_tokens(self_certainty, offsets)


def neg_entropy(
    entropy: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Minus the mean entropy of the model's distributions, in nats.

        reward[n] = -sum_s H(p_s) / length[n]

    Prefers long completions: late tokens are easier.

    Source:
        Agarwal et al. 2025, arXiv:2505.15134; a baseline in Kang et al. 2025, arXiv:2502.18581.

    Example:
        >>> import torch
        >>> neg_entropy(torch.tensor([0.5, 1.5]), torch.tensor([0, 2]))
        tensor([-1.])
    """
    return -mean_of_tokens(entropy, offsets)
