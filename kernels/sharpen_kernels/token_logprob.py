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

from . import _token_logprob_torch as blocked
from ._launch import check_device, check_dtype, check_options, check_shape, runs_triton
from ._logits import DIFFERENTIABLE, Read, pair_values
from ._rows import Pairs
from .stats import LOGIT_NAMES, LogitStatistic, TokenStats

FLOATS = (torch.float16, torch.bfloat16, torch.float64, torch.float32)


def _route(logits: Tensor):
    """The module that computes where `logits` live."""
    if logits.shape[0] > 0 and runs_triton(logits, logits.dtype):
        from . import _token_logprob_triton as triton_route

        return triton_route
    return blocked


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [K, S] of `stats` but `top1`; `top1` ([0] unless asked for); what backward needs."""
    R, S = logits.shape[0], target.shape[0]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    names = stats.split(",")
    if R == 0 or S == 0:
        values = logits.new_full((len(_floats(names)), S), float("nan"), dtype=dtype)
        values.masked_fill_(target == ignore_index, 0.0)
        top1 = torch.full_like(target, -1) if "top1" in names else target.new_zeros(0)
        return values, top1, logits.new_zeros((4, R), dtype=dtype)
    read = Read(temperature, softcap, vocab_size, vocab_mask)
    pairs = Pairs.of(target, rows, R)
    found, chosen, rank = _route(logits).forward(logits, read, pairs, names)
    values, top1 = pair_values(names, found, chosen, rank, pairs, vocab_size, ignore_index)
    return values, top1, found.state()


def _floats(names: list[str]) -> list[str]:
    return [name for name in names if name != "top1"]


@_token_logprob.register_fake
def _(logits, target, rows, vocab_mask, temperature, softcap, vocab_size, ignore_index, stats):
    dtype = torch.promote_types(logits.dtype, torch.float32)
    names = stats.split(",")
    S = target.shape[0]
    values = logits.new_empty((len(_floats(names)), S), dtype=dtype)
    top1 = target.new_empty(S if "top1" in names else 0)
    return values, top1, logits.new_empty((4, logits.shape[0]), dtype=dtype)


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
    """Gradient of the logits, contiguous, in their dtype."""
    R = logits.shape[0]
    if R == 0 or target.shape[0] == 0:
        return logits.new_zeros(logits.shape)
    read = Read(temperature, softcap, vocab_size, vocab_mask)
    pairs = Pairs.of(target, rows, R)
    counts, _ = pairs.counted(R, vocab_size, ignore_index)
    given = dict(zip(_floats(stats.split(",")), dvalues.to(state.dtype), strict=True))
    zero = torch.zeros_like(target, dtype=state.dtype)
    grads = torch.stack([given.get(name, zero) for name in DIFFERENTIABLE])
    grads = torch.where(counts, pairs.sort(grads), 0.0)
    return _route(logits).backward(grads, state, logits, read, pairs)


@_token_logprob_bwd.register_fake
def _(dvalues, state, logits, *rest):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, target, rows, vocab_mask, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[2], logits, target, rows, vocab_mask)


def _backward(ctx, dvalues, _dtop1, _dstate):
    dlogits = _token_logprob_bwd(dvalues, *ctx.saved_tensors, *ctx.options)
    return dlogits, None, None, None, None, None, None, None, None


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
    stats: Sequence[LogitStatistic] = ("logprob",),
) -> TokenStats:
    """Statistics, in nats, of `target` under the softmax of `logits`, each read once.

        z = softcap(logits) / temperature,    softcap(u) = c tanh(u / c)
        logprob[s] = z[rows[s], target[s]] - log(sum_v exp(z[rows[s], v]))

    The formula of every statistic is on `TokenStats`. Logits of -inf are outside the vocabulary:
    they count in no statistic and get no gradient.

    Args:
        logits: As the model's head leaves them, columns past `vocab_size` unused; fp16, bf16,
            fp32 or fp64; any strides, not copied.
        target: Token ids to score. `ignore_index` gives exactly 0 in every statistic (-1 in
            `top1`); any other id outside [0, vocab_size) gives NaN there (-1 in `top1`). Neither
            gets a gradient.
        rows: The row that predicts each target, in any order, repeats welcome. None pairs row s
            with target s. A row outside [0, R) gives NaN.
        temperature: Divides the logits; finite and above 0.
        softcap: The cap c, above 0; None for no cap.
        vocab_size: Tokens of the vocabulary, where `logits` has further columns.
        vocab_mask: True where a column belongs to the vocabulary; the others are -inf, after
            softcap and temperature. One mask for all rows; one a row goes into `logits` as -inf.
        ignore_index: The target of a position that is not scored.
        stats: Which statistics to compute; each comes out the same in any company. `rank` takes
            a second read.

    Returns:
        `TokenStats` of [S] tensors in the order of `target`, fp32 (fp64 for fp64 logits; `top1`
        int64). `logprob`, `lse`, `entropy` and `self_certainty` are differentiable, once. A row
        that is all masked has lse -inf and the rest NaN; NaN, and +inf, make NaN of their row.

    Raises:
        ValueError: If a shape, device, number or name of a statistic is not as above.
        TypeError: If a dtype is not.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, float("-inf")]])
        >>> found = token_logprob(logits, torch.tensor([1, 0]), stats=("logprob", "top1", "rank"))
        >>> found.logprob, found.top1, found.rank
        (tensor([-0.6931,  0.0000]), tensor([0, 0]), tensor([2., 1.]))
    """
    names = check_options(stats, LOGIT_NAMES, temperature, softcap)
    V = _check_tensors(logits, target, rows, vocab_size, vocab_mask)
    options = (float(temperature), softcap, V, ignore_index, ",".join(names))
    values, top1, _ = _token_logprob(logits, target, rows, vocab_mask, *options)
    found = dict(zip(_floats(list(names)), values, strict=True))
    found = {name: x if name in DIFFERENTIABLE else x.detach() for name, x in found.items()}
    return TokenStats(**found, top1=top1 if "top1" in names else None)


def _check_tensors(
    logits: Tensor,
    target: Tensor,
    rows: Tensor | None,
    vocab_size: int | None,
    vocab_mask: Tensor | None,
) -> int:
    """Raise unless the tensors fit together; the number of columns that count."""
    if logits.ndim != 2:
        fix = "flatten the leading dimensions" if logits.ndim > 2 else "unsqueeze it"
        raise ValueError(f"`logits` must be 2-D, got shape {tuple(logits.shape)}; {fix}.")
    check_dtype("logits", logits, *FLOATS)
    R, V = logits.shape
    if target.ndim != 1:
        raise ValueError(
            f"`target` must be 1-D, got shape {tuple(target.shape)}; call `.flatten()`."
        )
    check_dtype("target", target, torch.int64)
    check_device("target", target, logits.device, like="logits")
    if rows is None:
        check_shape("target", target, R=R)
    else:
        check_dtype("rows", rows, torch.int64)
        check_shape("rows", rows, S=target.shape[0])
        check_device("rows", rows, logits.device, like="logits")
    n_columns = V if vocab_size is None else vocab_size
    if not 1 <= n_columns <= V:
        raise ValueError(
            f"`vocab_size` must be in 1..{V}, the columns of `logits`, got {n_columns}."
        )
    if vocab_mask is not None:
        check_dtype("vocab_mask", vocab_mask, torch.bool)
        check_shape("vocab_mask", vocab_mask, V=V)
        check_device("vocab_mask", vocab_mask, logits.device, like="logits")
    return n_columns


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
    stats: Sequence[LogitStatistic] = ("logprob",),
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
    largest = torch.nn.functional.pad(z, (0, 1), value=float("-inf")).topk(2, dim=1).values
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
        "margin": largest[:, 0] - largest[:, 1],
        "rank": 1 + ahead.sum(1).to(dtype),
    }
    ignored = target == ignore_index
    inside = (target >= 0) & (target < V)
    nan = float("nan")
    found = {
        name: every[name].masked_fill(~inside, nan).masked_fill(ignored, 0.0)
        for name in stats
        if name != "top1"
    }
    top1 = z.argmax(1).masked_fill(~inside, -1) if "top1" in stats else None
    return TokenStats(**found, top1=top1)
