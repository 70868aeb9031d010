"""The custom op behind `linear_logprob`: the choice of a route, the fake and the gradient.

`vocab_parallel` computes its shards by the same route, and shares what is said here of gradients.

R hidden rows, S (row, target) pairs, V vocabulary, D hidden.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _linear_logprob_cpu as native
from . import _linear_logprob_torch as blocked
from ._checks import exact_matmul, runs_triton
from ._head import Head, Transform, sum_dtype
from ._state import Pairs, Values, finish, pair_values
from .stats import DIFFERENTIABLE, Wanted


def route_of(hidden: Tensor, head: Head) -> Any:
    """The module that computes these tensors: one for forward, ranks and backward, never by R."""
    if runs_triton(hidden, sum_dtype(hidden, head.weight)):
        from . import _linear_logprob_triton as fused
        from . import _linear_logprob_vendor as vendor

        return fused if fused.takes(hidden, head) else vendor
    return native if native.takes(hidden, head) else blocked


@torch.library.custom_op("sharpen::linear_logprob", mutates_args=())
def linear_logprob_op(
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
    dtype = sum_dtype(hidden, weight)
    wanted = Wanted(tuple(stats.split(",")), renyi_order, k)
    if R == 0 or target.shape[0] == 0:
        values = Values.of_no_row(wanted, target, ignore_index, dtype)
        return *values.all(), hidden.new_zeros((4, R), dtype=dtype)
    head = Head(weight, bias, Transform(temperature, softcap, vocab_size, vocab_mask))
    pairs = Pairs.of(target, rows, R)
    route = route_of(hidden, head)
    with exact_matmul(hidden.device):
        part, chosen = route.forward(hidden, head, pairs, wanted)
        rank = 1 + route.ranks(hidden, head, pairs, chosen) if "rank" in wanted.names else None
    found = finish(part, renyi_order)
    values = pair_values(wanted, found, chosen, rank, pairs, vocab_size, ignore_index)
    return *values.all(), found.state()


@linear_logprob_op.register_fake
def _(hidden, weight, target, rows, bias, vocab_mask, *options):
    dtype = sum_dtype(hidden, weight)
    *_, stats, renyi_order, k = options
    wanted = Wanted(tuple(stats.split(",")), renyi_order, k)
    values = Values.empty(wanted, target.shape[0], hidden, dtype)
    return *values.all(), hidden.new_empty((4, hidden.shape[0]), dtype=dtype)


@torch.library.custom_op("sharpen::linear_logprob_bwd", mutates_args=())
def _backward_op(
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
    head = Head(weight, bias, Transform(temperature, softcap, vocab_size, vocab_mask))
    pairs = Pairs.of(target, rows, R)
    counts, _ = pairs.counted(R, vocab_size, ignore_index)
    grads = pair_grads(stats.split(","), dvalues.to(state.dtype), pairs, counts)
    route = route_of(hidden, head) if R > 0 and grads and target.shape[0] > 0 else blocked
    with exact_matmul(hidden.device):
        found = route.backward(grads, state, hidden, head, pairs, needs)
    return returned(found, hidden)


@_backward_op.register_fake
def _(dvalues, state, hidden, weight, target, rows, bias, *options):
    return unwritten(hidden, weight, bias, options[-1])


def _save(ctx, inputs, output):
    *tensors, temperature, softcap, vocab_size, ignore_index, stats, renyi_order, k = inputs
    numbers = ",".join(Wanted(tuple(stats.split(",")), renyi_order, k).numbers)
    ctx.options = temperature, softcap, vocab_size, ignore_index, numbers
    ctx.mark_non_differentiable(*output[1:4])
    ctx.save_for_backward(output[4], *tensors)


def _backward(ctx, dvalues, *_):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    found = _backward_op(dvalues, *ctx.saved_tensors, *ctx.options, needs)
    dhidden, dweight, dbias = needed(found, needs)
    return dhidden, dweight, None, None, dbias, *[None] * 8


linear_logprob_op.register_autograd(_backward, setup_context=_save)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias


def pair_grads(
    names: Sequence[str], dvalues: Tensor, pairs: Pairs, counts: Tensor
) -> dict[str, Tensor]:
    """`dvalues` [K, S] by name, in the order of the pairs, 0 where a pair does not count."""
    dvalues = torch.where(counts, pairs.sort(dvalues), 0.0)
    named = zip(names, dvalues, strict=True)
    return {name: g for name, g in named if name in DIFFERENTIABLE}


def returned(found: Iterable[Tensor | None], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as an op returns them: an empty tensor for one that is not needed."""
    dhidden, dweight, dbias = (hidden.new_empty(0) if x is None else x for x in found)
    return dhidden.to(hidden.dtype), dweight, dbias


def unwritten(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `returned` gives, unwritten: shapes and dtypes alone."""
    given = zip((hidden, weight, bias), needs, strict=True)
    dhidden, dweight, dbias = (
        torch.empty_like(x) if need and x is not None else hidden.new_empty(0) for x, need in given
    )
    return dhidden.contiguous(), dweight, dbias


def needed(found: Sequence[Tensor], needs: Sequence[bool]) -> Gradients:
    """Gradients as autograd takes them: None for one that is not needed."""
    dhidden, dweight, dbias = (g if need else None for g, need in zip(found, needs, strict=True))
    return dhidden, dweight, dbias
