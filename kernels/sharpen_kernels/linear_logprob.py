"""Log-probability and statistics of given tokens from hidden rows, without their logits.

    z[r] = softcap(hidden[r] W^T + b) / temperature,    softcap(u) = c tanh(u / c)
    logprob[s] = z[rows[s], target[s]] - lse[rows[s]],  lse[r] = log(sum_v exp(z[r, v]))

The vocabulary is cut into fixed segments. A segment's logits live as tiles only; each leaves a
few running sums a row (online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867), merged in
one order. Backward computes the logits again. Nothing of size R x V is held in either direction.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.  Accumulates in fp32.  A row scores
the same bits in any batch and with any subset of statistics.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ._checks import check_head, check_options, check_vocabulary
from ._head import sum_dtype
from ._linear_logprob_op import linear_logprob_op
from ._state import Values
from .stats import Statistic, TokenStats
from .token_logprob import token_logprob_reference
from .vocab_parallel import is_dtensor, local_arguments, vocab_parallel_linear_logprob


def linear_logprob(
    hidden: Float[Tensor, "R D"],
    weight: Float[Tensor, "V D"],
    target: Int64[Tensor, " S"],
    *,
    rows: Int64[Tensor, " S"] | None = None,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_mask: Bool[Tensor, " V"] | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic] = ("logprob",),
    renyi_order: float = 2.0,
    k: int = 20,
) -> TokenStats:
    """Statistics, in nats, of `target` under the softmax of a linear head; no [R, V] logits.

        z = softcap(hidden W^T + bias) / temperature,    softcap(u) = c tanh(u / c)
        logprob[s] = z[rows[s], target[s]] - log(sum_v exp(z[rows[s], v]))

    The formula of every statistic is on `TokenStats`. Logits of -inf, by `vocab_mask` or `bias`,
    are outside the vocabulary: they count in no statistic and get no gradient.

    DTensors: those replicated are read locally. A weight cut by rows, Shard(0) over a mesh of one
    dimension, stays where it is (`vocab_parallel_linear_logprob`); bias and mask are cut like it,
    all else is the same on every rank of the mesh, and checked to be. Others are refused.

    Args:
        hidden: Final hidden rows, after the model's last norm; fp16, bf16, fp32 or fp64.
        weight: The head, rows past `vocab_size` unused; any strides, not copied.
        target: Token ids to score. `ignore_index` gives exactly 0 in every statistic (-1 for an
            id); any other id outside [0, vocab_size) gives NaN there (-1). Neither gets a gradient.
        rows: The hidden row that predicts each target, in any order, repeats welcome: the sum
            over the vocabulary is paid once a row. None pairs row s with target s. A row
            outside [0, R) gives NaN.
        bias: Added to the product, before softcap and temperature; -inf masks a column.
        temperature: Divides the logits; finite and above 0.
        softcap: The cap c, above 0; None for no cap.
        vocab_size: Tokens of the vocabulary, where `weight` is padded with further rows.
        vocab_mask: True where a column belongs to the vocabulary; the logits of the others are
            -inf, after softcap and temperature.
        ignore_index: The target of a position that is not scored.
        stats: Which statistics to compute; the value of one does not depend on which others are
            asked for. `rank` takes a second pass over the vocabulary.
        renyi_order: The order a of `renyi`; finite and above 0.
        k: Columns of `topk`, `topk_id` and `topk_mean`, 1 to 32.

    Returns:
        `TokenStats` in the order of `target`, fp32 (fp64 where an input is fp64). `logprob`, `lse`,
        `entropy` and `self_certainty` are differentiable, once, in hidden, weight and bias. A row
        whose columns are all masked has lse -inf and the rest NaN; NaN stays in its row.

    Raises:
        ValueError: If a shape, device, number, name of a statistic or placement is not as above.
        TypeError: If a dtype is not.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 5.0]])
        >>> found = linear_logprob(hidden, weight, torch.tensor([1]), stats=("logprob", "lse"))
        >>> found.logprob, found.lse
        (tensor([-0.6931]), tensor([2.6931]))
    """
    tensors = hidden, weight, target, rows, bias, vocab_mask
    if any(is_dtensor(x) for x in tensors):
        local = local_arguments(*tensors)
        hidden, weight, target, rows, bias, vocab_mask = local.tensors
        if local.group is not None:
            return vocab_parallel_linear_logprob(
                hidden,
                weight,
                target,
                group=local.group,
                rows=rows,
                bias=bias,
                temperature=temperature,
                softcap=softcap,
                vocab_size=local.n_rows if vocab_size is None else vocab_size,
                vocab_mask=vocab_mask,
                ignore_index=ignore_index,
                stats=stats,
                renyi_order=renyi_order,
                k=k,
                check_replicated=not local.is_replicated,
            )
    wanted = check_options(stats, temperature, softcap, renyi_order, k)
    V = check_head(hidden, weight, target, rows, bias)
    n_columns = check_vocabulary(vocab_size, vocab_mask, V, hidden, "rows of `weight`")
    tensors = hidden, weight, target, rows, bias, vocab_mask
    options = float(temperature), softcap, n_columns, ignore_index, ",".join(wanted.names)
    *values, _ = linear_logprob_op(*tensors, *options, *wanted[1:])
    return TokenStats.of(Values(*values).by_name(wanted))


def linear_logprob_reference(
    hidden: Float[Tensor, "R D"],
    weight: Float[Tensor, "V D"],
    target: Int64[Tensor, " S"],
    *,
    rows: Int64[Tensor, " S"] | None = None,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_mask: Bool[Tensor, " V"] | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic] = ("logprob",),
    renyi_order: float = 2.0,
    k: int = 20,
) -> TokenStats:
    """`linear_logprob` in plain PyTorch, with all logits at once: fp64 in gives an fp64 oracle."""
    dtype = sum_dtype(hidden, weight)
    z = torch.matmul(hidden.to(dtype), weight.to(dtype).T)
    z = z if bias is None else z + bias.to(dtype)
    return token_logprob_reference(
        z,
        target,
        rows=rows,
        temperature=temperature,
        softcap=softcap,
        vocab_size=vocab_size,
        vocab_mask=vocab_mask,
        ignore_index=ignore_index,
        stats=stats,
        renyi_order=renyi_order,
        k=k,
    )
