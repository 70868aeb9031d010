"""DeepConf: how sure the model was, on the whole and where it was least sure.

S scored tokens, N completions.

The confidence of a token is minus the mean of the k = 20 largest log-probs before it, in nats:
the more the first token outweighs the others, the larger. Of a completion's L tokens and its
windows of w neighbours, `segment_reduce` takes the means. `window` counts tokens (an int) or is a
part of the completion (a float in (0, 1]); a window longer than the completion is all of it. The
paper's 2048 tokens would make every short output's windows its mean; the default is a tenth.
"""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen_kernels import segment_reduce
from sharpen_kernels.segment_reduce import SequenceStatistic

WINDOW = 0.1  # of the completion; chosen


def confidence(
    topk_mean: Float32[Tensor, " S"], offsets: Int64[Tensor, " bounds"]
) -> Float32[Tensor, " bounds-1"]:
    """Mean confidence of the tokens, in nats.

        reward[n] = sum_s C[s] / length[n],      C[s] = -mean of the top-k log-probs at s

    Looks at the distributions and not at the tokens drawn. A mean, so nearly free of length, but
    late tokens are easier: prefers long completions a little.

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, average trace confidence.

    Example:
        >>> confidence(torch.tensor([-2.0, -4.0]), torch.tensor([0, 2]))
        tensor([3.])
    """
    return _reduced(topk_mean, offsets, "mean", 1.0)


def confidence_lowest(
    topk_mean: Float32[Tensor, " S"],
    offsets: Int64[Tensor, " bounds"],
    *,
    window: int | float = WINDOW,
) -> Float32[Tensor, " bounds-1"]:
    """Confidence of the least sure window, in nats.

        reward[n] = min over windows g of mean_{s in g} C[s],      C as in `confidence`

    A window of a fixed number of tokens has more chances to be low in a long completion: prefers
    short ones. A fractional one averages over more tokens there: prefers long ones.

    Args:
        topk_mean: Of each scored token, nats.
        offsets: Where the tokens of each completion start, then S.
        window: Tokens in a window, or their part of the completion.

    Raises:
        InputError: If `window` is neither an int of at least 1 nor a float in (0, 1].

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, lowest group confidence.

    Example:
        >>> topk_mean, offsets = torch.tensor([-4.0, -1.0, -3.0, -5.0]), torch.tensor([0, 4])
        >>> confidence_lowest(topk_mean, offsets, window=2)  # of 2.5, 2 and 4
        tensor([2.])
    """
    return _reduced(topk_mean, offsets, "lowest_window", window)


def confidence_bottom(
    topk_mean: Float32[Tensor, " S"],
    offsets: Int64[Tensor, " bounds"],
    *,
    window: int | float = WINDOW,
) -> Float32[Tensor, " bounds-1"]:
    """Mean confidence of the least sure tenth of the windows, in nats.

        reward[n] = mean of the max(1, floor(W / 10)) lowest of the W windows' means of C

    C as in `confidence`. One window where there are fewer than 20: then it is `confidence_lowest`,
    and depends on length as that does.

    Args:
        topk_mean: Of each scored token, nats.
        offsets: Where the tokens of each completion start, then S.
        window: Tokens in a window, or their part of the completion.

    Raises:
        InputError: If `window` is neither an int of at least 1 nor a float in (0, 1].

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, bottom 10 % group confidence.

    Example:
        >>> topk_mean, offsets = -torch.arange(1.0, 31.0), torch.tensor([0, 30])
        >>> confidence_bottom(topk_mean, offsets, window=1)  # of 1, 2 and 3
        tensor([2.])
    """
    return _reduced(topk_mean, offsets, "bottom_windows", window)


def confidence_tail(
    topk_mean: Float32[Tensor, " S"],
    offsets: Int64[Tensor, " bounds"],
    *,
    window: int | float = WINDOW,
) -> Float32[Tensor, " bounds-1"]:
    """Confidence of the last window, in nats: where the answer stands.

        reward[n] = mean of C[s] over the last tokens of the completion,      C as in `confidence`

    Blind to what came before, so nearly free of length.

    Args:
        topk_mean: Of each scored token, nats.
        offsets: Where the tokens of each completion start, then S.
        window: Tokens in a window, or their part of the completion.

    Raises:
        InputError: If `window` is neither an int of at least 1 nor a float in (0, 1].

    Source:
        Fu et al. 2025 (DeepConf), arXiv:2508.15260, tail confidence.

    Example:
        >>> topk_mean, offsets = torch.tensor([-4.0, -1.0, -3.0, -5.0]), torch.tensor([0, 4])
        >>> confidence_tail(topk_mean, offsets, window=0.5)
        tensor([4.])
    """
    return _reduced(topk_mean, offsets, "tail_window", window)


def _reduced(
    topk_mean: Float32[Tensor, " S"],
    offsets: Int64[Tensor, " bounds"],
    how: SequenceStatistic,
    window: int | float,
) -> Float32[Tensor, " bounds-1"]:
    # a bool is an int, but no number of tokens
    is_count = isinstance(window, int) and not isinstance(window, bool)
    if not (window >= 1 if is_count else isinstance(window, float) and 0 < window <= 1):
        raise InputError(
            f"`window` must be an int of at least 1 (tokens) or a float in (0, 1] (a part of the "
            f"completion), got {window!r}."
        )
    # + 0.0 turns the -0.0 of a sure token, which would print, into 0.0
    values = {"confidence": -topk_mean + 0.0}
    reduced = segment_reduce(values, offsets, stats=(how,), window=window)
    found = getattr(reduced.sequences["confidence"], how)
    assert isinstance(found, torch.Tensor)
    return found
