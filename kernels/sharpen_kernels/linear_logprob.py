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
from jaxtyping import Float, Int64
from torch import Tensor

from . import _linear_logprob_cpu as native
from . import _linear_logprob_torch as chunked
from ._launch import (
    check_device,
    check_dtype,
    check_options,
    check_shape,
    exact_matmul,
    runs_triton,
)
from ._rows import Pairs, Rows, token_values
from .stats import NAMES, Statistic, TokenStats

FLOATS = (torch.float16, torch.bfloat16, torch.float64, torch.float32)


def _wide(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What sums are kept and values returned in: fp32, or fp64 where an input is."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _state(rows: Rows) -> Tensor:
    """What backward reads [4, R]: top, log_mass, entropy, n_valid; 0 where not computed."""
    zero = torch.zeros_like(rows.top)
    kept = (rows.top, rows.log_mass, rows.entropy, rows.n_valid)
    return torch.stack([zero if x is None else x for x in kept])


@torch.library.custom_op("sharpen::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    ignore_index: int,
    stats: str,
) -> tuple[Tensor, Tensor]:
    """Values [K, S] of the K statistics named in `stats`, and what backward needs of each row."""
    R = hidden.shape[0]
    dtype = _wide(hidden, weight)
    names = stats.split(",")
    if R == 0 or target.shape[0] == 0:
        values = hidden.new_full((len(names), target.shape[0]), float("nan"), dtype=dtype)
        values.masked_fill_(target == ignore_index, 0.0)
        return values, hidden.new_zeros((4, R), dtype=dtype)
    head = chunked.Head(weight, bias, temperature, softcap, vocab_size)
    pairs = Pairs.of(target, rows, R)
    with exact_matmul(hidden.device):
        if runs_triton(hidden, dtype):
            from . import _linear_logprob_fwd as fused

            done, chosen = fused.forward(hidden, head, pairs, names)
        elif native.takes(hidden, head):
            done, chosen = native.forward(hidden, head, pairs, names)
        else:
            done, chosen = chunked.forward(hidden, head, pairs, names)
    return token_values(names, done, chosen, pairs, vocab_size, ignore_index), _state(done)


@_linear_logprob.register_fake
def _(hidden, weight, target, rows, bias, temperature, softcap, vocab_size, ignore_index, stats):
    dtype = _wide(hidden, weight)
    values = hidden.new_empty((stats.count(",") + 1, target.shape[0]), dtype=dtype)
    return values, hidden.new_empty((4, hidden.shape[0]), dtype=dtype)


@torch.library.custom_op("sharpen::linear_logprob_bwd", mutates_args=())
def _linear_logprob_bwd(
    dvalues: Tensor,
    state: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_size: int,
    ignore_index: int,
    stats: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for each that `needs` leaves out."""
    head = chunked.Head(weight, bias, temperature, softcap, vocab_size)
    pairs = Pairs.of(target, rows, hidden.shape[0])
    counts, _ = pairs.counted(hidden.shape[0], vocab_size, ignore_index)
    dvalues = torch.where(counts, pairs.sort(dvalues.to(state.dtype)), 0.0)
    names = stats.split(",")
    grads = {n: g for n, g in zip(names, dvalues, strict=True) if n != "is_greedy"}
    with exact_matmul(hidden.device):
        if hidden.shape[0] > 0 and runs_triton(hidden, state.dtype):
            # one GEMM's rounding must serve p and lse: for p near 1, 1 - p is but rounding
            state = _state(chunked.forward(hidden, head, pairs, names)[0])
            found = chunked.backward(grads, state, hidden, head, pairs, needs)
        elif hidden.shape[0] > 0 and grads and target.shape[0] > 0 and native.takes(hidden, head):
            found = native.backward(grads, state, hidden, head, pairs, needs)
        else:
            found = chunked.backward(grads, state, hidden, head, pairs, needs)
    dhidden, dweight, dbias = (hidden.new_empty(0) if x is None else x for x in found)
    return dhidden, dweight, dbias


@_linear_logprob_bwd.register_fake
def _(dvalues, state, hidden, weight, target, rows, bias, *options):
    wanted = zip((hidden, weight, bias), options[-1], strict=True)
    dhidden, dweight, dbias = (
        torch.empty_like(x) if need and x is not None else hidden.new_empty(0) for x, need in wanted
    )
    return dhidden.contiguous(), dweight, dbias


def _save(ctx, inputs, output):
    hidden, weight, target, rows, bias, *ctx.options = inputs
    ctx.save_for_backward(output[1], hidden, weight, target, rows, bias)


def _backward(ctx, dvalues, _dstate):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    found = _linear_logprob_bwd(dvalues, *ctx.saved_tensors, *ctx.options, needs)
    dhidden, dweight, dbias = (g if need else None for g, need in zip(found, needs, strict=True))
    return dhidden, dweight, None, None, dbias, None, None, None, None, None


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
    ignore_index: int = -100,
    stats: Sequence[Statistic] = ("logprob",),
) -> TokenStats:
    """Statistics, in nats, of `target` under the softmax of a linear head; no [R, V] logits.

        z = softcap(hidden W^T + bias) / temperature,    softcap(u) = c tanh(u / c)
        logprob[s] = z[rows[s], target[s]] - log(sum_v exp(z[rows[s], v]))

    The formula of every statistic is on `TokenStats`. Logits of -inf (a mask, through `bias`)
    are outside the vocabulary: they count in no statistic and get no gradient.

    Args:
        hidden: Final hidden rows, after the model's last norm; fp16, bf16, fp32 or fp64.
        weight: The head, rows past `vocab_size` unused; any strides, not copied.
        target: Token ids to score. `ignore_index` gives exactly 0 in every statistic; any other
            id outside [0, vocab_size) gives NaN there. Neither gets a gradient.
        rows: The hidden row that predicts each target, in any order, repeats welcome: the sum
            over the vocabulary is paid once a row. None pairs row s with target s. A row
            outside [0, R) gives NaN.
        bias: Added to the product, before softcap and temperature; -inf masks a column.
        temperature: Divides the logits; finite and above 0.
        softcap: The cap c, above 0; None for no cap.
        vocab_size: Tokens of the vocabulary, where `weight` is padded with further rows.
        ignore_index: The target of a position that is not scored.
        stats: Which statistics to compute; each comes out the same in any company.

    Returns:
        `TokenStats` of [S] tensors in the order of `target`, fp32 (fp64 where an input is fp64).
        All but `is_greedy` are differentiable, once, in hidden, weight and bias. A row whose
        columns are all masked has lse -inf and the rest NaN; NaN stays in its row.

    Raises:
        ValueError: If a shape, device, number or name of a statistic is not as above.
        TypeError: If a dtype is not.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [2.0, 5.0]])
        >>> found = linear_logprob(hidden, weight, torch.tensor([1]), stats=("logprob", "lse"))
        >>> found.logprob, found.lse
        (tensor([-0.6931]), tensor([2.6931]))
    """
    names = check_options(stats, NAMES, temperature, softcap)
    V = _check_tensors(hidden, weight, target, rows, bias, vocab_size)
    options = (float(temperature), softcap, V, ignore_index, ",".join(names))
    values, _ = _linear_logprob(hidden, weight, target, rows, bias, *options)
    found = dict(zip(names, values, strict=True))
    if "is_greedy" in found:
        found["is_greedy"] = found["is_greedy"].detach()
    return TokenStats(**found)


def _check_tensors(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    bias: Tensor | None,
    vocab_size: int | None,
) -> int:
    """Raise unless the tensors fit together; the number of columns that count."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.ndim != 2:
            fix = "flatten the leading dimensions" if x.ndim > 2 else "unsqueeze it"
            raise ValueError(f"`{name}` must be 2-D, got shape {tuple(x.shape)}; {fix}.")
        check_dtype(name, x, *FLOATS)
    R, D = hidden.shape
    V = weight.shape[0]
    check_shape("weight", weight, V=V, D=D)
    if target.ndim != 1:
        raise ValueError(
            f"`target` must be 1-D, got shape {tuple(target.shape)}; call `.flatten()`."
        )
    check_dtype("target", target, torch.int64)
    if rows is None:
        check_shape("target", target, R=R)
    else:
        check_dtype("rows", rows, torch.int64)
        check_shape("rows", rows, S=target.shape[0])
        check_device("rows", rows, hidden.device)
    if bias is not None:
        check_dtype("bias", bias, *FLOATS)
        check_shape("bias", bias, V=V)
        check_device("bias", bias, hidden.device)
    check_device("weight", weight, hidden.device)
    check_device("target", target, hidden.device)
    n_columns = V if vocab_size is None else vocab_size
    if not 1 <= n_columns <= V:
        raise ValueError(f"`vocab_size` must be in 1..{V}, the rows of `weight`, got {n_columns}.")
    return n_columns


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
    ignore_index: int = -100,
    stats: Sequence[Statistic] = ("logprob",),
) -> TokenStats:
    """`linear_logprob` in plain PyTorch, with all logits at once: fp64 in gives an fp64 oracle."""
    dtype = _wide(hidden, weight)
    V = vocab_size or weight.shape[0]
    z = hidden.to(dtype) @ weight[:V].to(dtype).T
    z = z if bias is None else z + bias[:V].to(dtype)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    rows = torch.arange(len(target), device=target.device) if rows is None else rows
    z = z[rows]
    lse, log_p, masked = z.logsumexp(1), z.log_softmax(1), z == float("-inf")
    n = (~masked).sum(1)
    ignored = target == ignore_index
    inside = (target >= 0) & (target < V)
    every = {
        "logprob": log_p.gather(1, target.clamp(0, V - 1)[:, None])[:, 0],
        "lse": lse,
        "entropy": -(log_p.exp() * log_p.masked_fill(masked, 0.0)).sum(1),
        "self_certainty": lse - z.masked_fill(masked, 0.0).sum(1) / n - n.log(),
        "is_greedy": (z.argmax(1) == target).to(dtype),
    }
    nan = float("nan")
    found = {
        name: every[name].masked_fill(~inside, nan).masked_fill(ignored, 0.0) for name in stats
    }
    return TokenStats(**found)
