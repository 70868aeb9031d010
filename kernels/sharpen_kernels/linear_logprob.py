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
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from . import _linear_logprob_chunk as chunked
from . import _linear_logprob_cpu as native
from ._launch import (
    FLOATS,
    check_device,
    check_dtype,
    check_options,
    check_pairs,
    check_shape,
    check_vocabulary,
    exact_matmul,
    runs_triton,
)
from ._pairs import Pairs, Values, pair_values
from ._rows import finish
from .stats import DIFFERENTIABLE, Statistic, TokenStats, Wanted
from .token_logprob import token_logprob_reference


def _wide(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What sums are kept and values returned in: fp32, or fp64 where an input is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _route(hidden: Tensor, head: chunked.Head) -> Any:
    """The module that computes these tensors: one for forward, ranks and backward, never by R."""
    if runs_triton(hidden, _wide(hidden, head.weight)):
        from . import _linear_logprob_fused as fused
        from . import _linear_logprob_vendor as vendor

        return fused if fused.takes(hidden, head) else vendor
    return native if native.takes(hidden, head) else chunked


@torch.library.custom_op("sharpen::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    vocab_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    ignore_index: int,
    stats: str,
    renyi_order: float,
    k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Values`, and what backward needs of each row [4, R]."""
    R = hidden.shape[0]
    dtype = _wide(hidden, weight)
    wanted = Wanted(tuple(stats.split(",")), renyi_order, k)
    if R == 0 or target.shape[0] == 0:
        values = Values.of_no_row(wanted, target, ignore_index, dtype)
        return *values.all(), hidden.new_zeros((4, R), dtype=dtype)
    head = chunked.Head(weight, bias, temperature, softcap, vocab_size, vocab_mask)
    pairs = Pairs.of(target, rows, R)
    route = _route(hidden, head)
    with exact_matmul(hidden.device):
        part, chosen = route.forward(hidden, head, pairs, wanted)
        rank = 1 + route.ranks(hidden, head, pairs, chosen) if "rank" in wanted.names else None
    found = finish(part, renyi_order)
    values = pair_values(wanted, found, chosen, rank, pairs, vocab_size, ignore_index)
    return *values.all(), found.state()


@_linear_logprob.register_fake
def _(hidden, weight, target, rows, bias, vocab_mask, *options):
    dtype = _wide(hidden, weight)
    *_, stats, renyi_order, k = options
    wanted = Wanted(tuple(stats.split(",")), renyi_order, k)
    values = Values.empty(wanted, target.shape[0], hidden, dtype)
    return *values.all(), hidden.new_empty((4, hidden.shape[0]), dtype=dtype)


@torch.library.custom_op("sharpen::linear_logprob_bwd", mutates_args=())
def _linear_logprob_bwd(
    dvalues: Tensor,
    state: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    vocab_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    ignore_index: int,
    stats: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that `needs` leaves out.

    `stats` names the rows of `dvalues` [K, S].
    """
    R = hidden.shape[0]
    head = chunked.Head(weight, bias, temperature, softcap, vocab_size, vocab_mask)
    pairs = Pairs.of(target, rows, R)
    counts, _ = pairs.counted(R, vocab_size, ignore_index)
    dvalues = torch.where(counts, pairs.sort(dvalues.to(state.dtype)), 0.0)
    named = zip(stats.split(","), dvalues, strict=True)
    grads = {name: g for name, g in named if name in DIFFERENTIABLE}
    route = _route(hidden, head) if R > 0 and grads and target.shape[0] > 0 else chunked
    with exact_matmul(hidden.device):
        found = route.backward(grads, state, hidden, head, pairs, needs)
    dhidden, dweight, dbias = (hidden.new_empty(0) if x is None else x for x in found)
    return dhidden.to(hidden.dtype), dweight, dbias


@_linear_logprob_bwd.register_fake
def _(dvalues, state, hidden, weight, target, rows, bias, *options):
    wanted = zip((hidden, weight, bias), options[-1], strict=True)
    dhidden, dweight, dbias = (
        torch.empty_like(x) if need and x is not None else hidden.new_empty(0) for x, need in wanted
    )
    return dhidden.contiguous(), dweight, dbias


def _save(ctx, inputs, output):
    *tensors, temperature, softcap, vocab_size, ignore_index, stats, renyi_order, k = inputs
    numbers = ",".join(Wanted(tuple(stats.split(",")), renyi_order, k).numbers)
    ctx.options = temperature, softcap, vocab_size, ignore_index, numbers
    ctx.mark_non_differentiable(*output[1:4])
    ctx.save_for_backward(output[4], *tensors)


def _backward(ctx, dvalues, *_):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    found = _linear_logprob_bwd(dvalues, *ctx.saved_tensors, *ctx.options, needs)
    dhidden, dweight, dbias = (g if need else None for g, need in zip(found, needs, strict=True))
    return dhidden, dweight, None, None, dbias, *[None] * 8


_linear_logprob.register_autograd(_backward, setup_context=_save)


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
        stats: Which statistics to compute; each comes out the same in any company. `rank` takes
            a second pass over the vocabulary.
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
    if any(hasattr(x, "placements") for x in (hidden, weight, target, rows, bias, vocab_mask)):
        from ._dtensor import linear_logprob_of_dtensors

        return linear_logprob_of_dtensors(
            hidden, weight, target, rows=rows, bias=bias, temperature=temperature, softcap=softcap,
            vocab_size=vocab_size, vocab_mask=vocab_mask, ignore_index=ignore_index, stats=stats,
            renyi_order=renyi_order, k=k,
        )  # fmt: skip
    wanted = check_options(stats, temperature, softcap, renyi_order, k)
    V = _check_tensors(hidden, weight, target, rows, bias)
    n_columns = check_vocabulary(vocab_size, vocab_mask, V, hidden, "rows of `weight`")
    *values, _ = _linear_logprob(
        hidden, weight, target, rows, bias, vocab_mask,
        float(temperature), softcap, n_columns, ignore_index, ",".join(wanted.names), *wanted[1:],
    )  # fmt: skip
    return TokenStats.of(Values(*values).by_name(wanted))


def _check_tensors(
    hidden: Tensor, weight: Tensor, target: Tensor, rows: Tensor | None, bias: Tensor | None
) -> int:
    """Raise unless the tensors fit together; the number of rows of the weight."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.ndim != 2:
            fix = "flatten the leading dimensions" if x.ndim > 2 else "unsqueeze it"
            raise ValueError(f"`{name}` must be 2-D, got shape {tuple(x.shape)}; {fix}.")
        check_dtype(name, x, *FLOATS)
    R, D = hidden.shape
    V = weight.shape[0]
    check_shape("weight", weight, V=V, D=D)
    check_device("weight", weight, hidden.device)
    check_pairs(target, rows, R, hidden.device, "hidden")
    if bias is not None:
        check_dtype("bias", bias, *FLOATS)
        check_shape("bias", bias, V=V)
        check_device("bias", bias, hidden.device)
    return V


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
    dtype = _wide(hidden, weight)
    z = hidden.to(dtype) @ weight.to(dtype).T
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
