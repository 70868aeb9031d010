"""Log-probability and statistics of given tokens from logits that are already there.

    z[r] = softcap(logits[r]) / temperature,    softcap(u) = c tanh(u / c)
    logprob[s] = z[rows[s], target[s]] - lse[rows[s]],  lse[r] = log(sum_v exp(z[r, v]))

Forward reads each logit once, whatever is asked but `rank`, and keeps a few running sums a row,
centred on its running maximum (online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867).
Backward rebuilds the softmax from them and holds nothing of size R x V but the gradient itself.

R rows of logits, S (row, target) pairs, V vocabulary.  Accumulates in fp32.  A row scores the same
bits in any batch and with any subset of statistics.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from . import _token_logprob_cpu as native
from . import _token_logprob_torch as blocked
from ._checks import (
    FLOATS,
    check_dtype,
    check_options,
    check_pairs,
    check_vocabulary,
    runs_triton,
)
from ._head import Transform, sum_dtype
from ._state import Pairs, Values, finish, pair_values
from .stats import DIFFERENTIABLE, Statistic, TokenStats, Wanted


def _route(logits: Tensor):
    """The module that computes where `logits` live."""
    if logits.shape[0] > 0 and runs_triton(logits, logits.dtype):
        from . import _token_logprob_triton as triton_route

        return triton_route
    return native if native.takes(logits) else blocked


@torch.library.custom_op("sharpen::token_logprob", mutates_args=())
def _token_logprob(
    logits: Tensor,
    target: Tensor,
    rows: Tensor | None,
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
    R, S = logits.shape[0], target.shape[0]
    dtype = sum_dtype(logits)
    wanted = Wanted(tuple(stats.split(",")), renyi_order, k)
    if R == 0 or S == 0:
        values = Values.of_no_row(wanted, target, ignore_index, dtype)
        return *values.all(), logits.new_zeros((4, R), dtype=dtype)
    transform = Transform(temperature, softcap, vocab_size, vocab_mask)
    pairs = Pairs.of(target, rows, R)
    route = _route(logits)
    part, chosen = route.forward(logits, transform, pairs, wanted)
    rank = 1 + route.ranks(logits, transform, pairs, chosen) if "rank" in wanted.names else None
    found = finish(part, renyi_order)
    values = pair_values(wanted, found, chosen, rank, pairs, vocab_size, ignore_index)
    return *values.all(), found.state()


@_token_logprob.register_fake
def _(logits, target, rows, vocab_mask, *options):
    dtype = sum_dtype(logits)
    *_, stats, renyi_order, k = options
    wanted = Wanted(tuple(stats.split(",")), renyi_order, k)
    values = Values.empty(wanted, target.shape[0], logits, dtype)
    return *values.all(), logits.new_empty((4, logits.shape[0]), dtype=dtype)


@torch.library.custom_op("sharpen::token_logprob_bwd", mutates_args=())
def _token_logprob_bwd(
    dvalues: Tensor,
    state: Tensor,
    logits: Tensor,
    target: Tensor,
    rows: Tensor | None,
    vocab_mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    ignore_index: int,
    stats: str,
) -> Tensor:
    """Gradient of the logits, contiguous, in their dtype; `stats` names the rows of `dvalues`."""
    R = logits.shape[0]
    if R == 0 or target.shape[0] == 0:
        return logits.new_zeros(logits.shape)
    transform = Transform(temperature, softcap, vocab_size, vocab_mask)
    pairs = Pairs.of(target, rows, R)
    counts, _ = pairs.counted(R, vocab_size, ignore_index)
    given = dict(zip(stats.split(","), dvalues.to(state.dtype), strict=True)) if stats else {}
    zero = torch.zeros_like(target, dtype=state.dtype)
    grads = torch.stack([given.get(name, zero) for name in DIFFERENTIABLE])
    grads = torch.where(counts, pairs.sort(grads), 0.0)
    return _route(logits).backward(grads, state, logits, transform, pairs)


@_token_logprob_bwd.register_fake
def _(dvalues, state, logits, *rest):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    *tensors, temperature, softcap, vocab_size, ignore_index, stats, renyi_order, k = inputs
    numbers = ",".join(Wanted(tuple(stats.split(",")), renyi_order, k).numbers)
    ctx.options = temperature, softcap, vocab_size, ignore_index, numbers
    ctx.mark_non_differentiable(*output[1:4])
    ctx.save_for_backward(output[4], *tensors)


def _backward(ctx, dvalues, *_):
    dlogits = _token_logprob_bwd(dvalues, *ctx.saved_tensors, *ctx.options)
    return dlogits, *[None] * 10


_token_logprob.register_autograd(_backward, setup_context=_save)


def token_logprob(
    logits: Float[Tensor, "R V"],
    target: Int64[Tensor, " S"],
    *,
    rows: Int64[Tensor, " S"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_mask: Bool[Tensor, " V"] | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic] = ("logprob",),
    renyi_order: float = 2.0,
    k: int = 20,
) -> TokenStats:
    """Statistics, in nats, of `target` under the softmax of `logits`, each read once.

        z = softcap(logits) / temperature,    softcap(u) = c tanh(u / c)
        logprob[s] = z[rows[s], target[s]] - log(sum_v exp(z[rows[s], v]))

    The formula of every statistic is on `TokenStats`. Logits of -inf are outside the vocabulary:
    they count in no statistic and get no gradient.

    Args:
        logits: As the model's head leaves them, columns past `vocab_size` unused; fp16, bf16,
            fp32 or fp64; any strides, not copied.
        target: Token ids to score. `ignore_index` gives exactly 0 in every statistic (-1 for an
            id); any other id outside [0, vocab_size) gives NaN there (-1). Neither gets a gradient.
        rows: The row that predicts each target, in any order, repeats welcome. None pairs row s
            with target s. A row outside [0, R) gives NaN.
        temperature: Divides the logits; finite and above 0.
        softcap: The cap c, above 0; None for no cap.
        vocab_size: Tokens of the vocabulary, where `logits` has further columns.
        vocab_mask: True where a column belongs to the vocabulary; the others are -inf, after
            softcap and temperature. One mask for all rows; one a row goes into `logits` as -inf.
        ignore_index: The target of a position that is not scored.
        stats: Which statistics to compute; the value of one does not depend on which others are
            asked for. `rank` takes a second read.
        renyi_order: The order a of `renyi`; finite and above 0.
        k: Columns of `topk`, `topk_id` and `topk_mean`, 1 to 32.

    Returns:
        `TokenStats` in the order of `target`, fp32 (fp64 for fp64 logits). `logprob`, `lse`,
        `entropy` and `self_certainty` are differentiable, once. A row that is all masked has lse
        -inf and the rest NaN; NaN, and +inf, make NaN of their row.

    Raises:
        ValueError: If a shape, device, number or name of a statistic is not as above.
        TypeError: If a dtype is not.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, float("-inf")]])
        >>> found = token_logprob(logits, torch.tensor([1, 0]), stats=("logprob", "top1", "rank"))
        >>> found.logprob, found.top1, found.rank
        (tensor([-0.6931,  0.0000]), tensor([0, 0]), tensor([2., 1.]))
    """
    wanted = check_options(stats, temperature, softcap, renyi_order, k)
    if logits.ndim != 2:
        fix = "flatten the leading dimensions" if logits.ndim > 2 else "unsqueeze it"
        raise ValueError(f"`logits` must be 2-D, got shape {tuple(logits.shape)}; {fix}.")
    check_dtype("logits", logits, *FLOATS)
    R, V = logits.shape
    check_pairs(target, rows, R, logits.device, "logits")
    n_columns = check_vocabulary(vocab_size, vocab_mask, V, logits, "columns of `logits`")
    options = float(temperature), softcap, n_columns, ignore_index, ",".join(wanted.names)
    *values, _ = _token_logprob(logits, target, rows, vocab_mask, *options, *wanted[1:])
    return TokenStats.of(Values(*values).by_name(wanted))


def token_logprob_reference(
    logits: Float[Tensor, "R V"],
    target: Int64[Tensor, " S"],
    *,
    rows: Int64[Tensor, " S"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    vocab_mask: Bool[Tensor, " V"] | None = None,
    ignore_index: int = -100,
    stats: Sequence[Statistic] = ("logprob",),
    renyi_order: float = 2.0,
    k: int = 20,
) -> TokenStats:
    """`token_logprob` in plain PyTorch, all logits at once: fp64 in gives an fp64 oracle."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    V = vocab_size or logits.shape[1]
    rows = torch.arange(len(target), device=target.device) if rows is None else rows
    z = logits[rows, :V].to(dtype)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    z = z if vocab_mask is None else z.masked_fill(~vocab_mask[:V], float("-inf"))
    lse, log_p, masked = z.logsumexp(1), z.log_softmax(1), z == float("-inf")
    n = (~masked).sum(1)
    at = target.clamp(0, V - 1)[:, None]
    chosen = z.gather(1, at)
    p, log_p_or_0 = log_p.exp(), log_p.masked_fill(masked, 0.0)
    entropy = -(p * log_p_or_0).sum(1)
    largest, ids = torch.nn.functional.pad(z, (0, max(2, k)), value=float("-inf")).sort(
        dim=1, descending=True, stable=True
    )
    topk, absent = largest[:, :k] - lse[:, None], largest[:, :k] == float("-inf")
    before = torch.arange(V, device=z.device) < at
    ahead = ((z > chosen) | ((z == chosen) & before)) & ~masked
    every = {
        "logprob": log_p.gather(1, at)[:, 0],
        "lse": lse,
        "entropy": entropy,
        "self_certainty": lse - z.masked_fill(masked, 0.0).sum(1) / n - n.log(),
        "is_greedy": (z.argmax(1) == target).to(dtype),
        "varentropy": (p * (log_p_or_0 + entropy[:, None]).square()).sum(1),
        "sum_p2": p.square().sum(1),
        "renyi": (renyi_order * log_p).exp().sum(1),
        "top1": z.argmax(1),
        "margin": largest[:, 0] - largest[:, 1],
        "rank": 1 + ahead.sum(1).to(dtype),
        "topk": topk,
        "topk_id": ids[:, :k].masked_fill(absent, -1),
        "topk_mean": topk.masked_fill(absent, 0.0).sum(1) / (~absent).sum(1),
    }
    ignored, inside = target == ignore_index, (target >= 0) & (target < V)
    found = {}
    for name in stats:
        x = every[name]
        shape = (-1, *[1] * (x.ndim - 1))
        outside, none = (-1, -1) if x.dtype == torch.int64 else (float("nan"), 0.0)
        x = x.masked_fill(~inside.view(shape), outside)
        found[name] = x.masked_fill(ignored.view(shape), none)
    return TokenStats(**found)
