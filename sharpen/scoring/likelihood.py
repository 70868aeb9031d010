"""Rewards of the tokens drawn: how probable the model found them.

S scored tokens, N completions; completion n owns the tokens offsets[n] ... offsets[n + 1] - 1.
"""

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from sharpen_kernels import segment_reduce


def sequence_logprob(
    logprob: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Log-probability of each completion, in nats: the self-reward of sharpening.

        reward[n] = sum_s logprob[s] = log p(completion n | its prompt)

    Prefers short completions: each further token can only lower it.

    Source:
        Huang et al. 2024, arXiv:2412.01951, Eq. 2.

    Example:
        >>> sequence_logprob(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-3., -4.])
    """
    return _sum(logprob, offsets).float()


def mean_logprob(
    logprob: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Log-probability per token, in nats: minus the logarithm of the perplexity.

        reward[n] = sum_s logprob[s] / length[n]

    Not the logarithm of a probability. Prefers long completions: late tokens are easier.

    Source:
        Huang et al. 2024, arXiv:2412.01951, section 2.

    Example:
        >>> mean_logprob(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-1.5000, -4.0000])
    """
    return mean_of_tokens(logprob, offsets)


def neg_perplexity(
    logprob: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Minus the perplexity of each completion: a number of equally likely tokens, at least 1.

        reward[n] = -exp(-sum_s logprob[s] / length[n])

    Perplexity with its sign turned, so that higher is better; log-probs in nats. Orders completions
    as `mean_logprob` does and prefers long ones as it does; only its scale differs, which soft
    choices and weighted votes feel.

    Source:
        Jelinek et al. 1977; a baseline in Kang et al. 2025, arXiv:2502.18581.

    Example:
        >>> logprob = torch.tensor([0.5, 0.125, 0.25]).log()
        >>> neg_perplexity(logprob, torch.tensor([0, 2, 3]))
        tensor([-4., -4.])
    """
    mean_N = _sum(logprob, offsets) / offsets.diff().clamp(min=1)
    return torch.where(offsets.diff() > 0, -(-mean_N).exp(), 0.0).float()


def min_token_logprob(
    logprob: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Log-probability of the least likely token of each completion, in nats.

        reward[n] = min_s logprob[s]

    One doubtful step is enough to sink a chain of steps. Prefers short completions: a further token
    can only lower it.

    Source:
        The lowest group confidence of Fu et al. 2025, arXiv:2508.15260, at the token drawn.

    Example:
        >>> min_token_logprob(torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 2, 3]))
        tensor([-2., -4.])
    """
    least = segment_reduce({"logprob": logprob}, offsets, stats=("min",)).sequences["logprob"].min
    assert least is not None
    return torch.where(offsets.diff() > 0, least, 0.0)


def _sum(
    values: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float64[Tensor, " bounds-1"]:
    return torch.segment_reduce(values.double(), "sum", offsets=offsets)


def mean_of_tokens(
    values: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Mean of the values of each completion, summed in fp64 in token order; 0 of none."""
    return (_sum(values, offsets) / offsets.diff().clamp(min=1)).float()
