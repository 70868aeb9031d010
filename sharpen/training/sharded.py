"""Gradients of a batch that is cut into micro-batches, by processes that run equally many of them.

S scored tokens of the batch.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sharpen.scoring.batching import inverse_of
from sharpen.scoring.bounded import refuse_dropout
from sharpen.scoring.lockstep import MicroBatch


def accumulate(
    model: nn.Module,
    run: Callable[[MicroBatch], Tensor],
    parts: Sequence[MicroBatch],
    fillers: Sequence[MicroBatch],
    loss: Callable[[Float[Tensor, " S"]], Tensor],
) -> None:
    """Add the gradient of a loss of the log-probs to `.grad`, one micro-batch in memory at a time.

    Each is run twice: all of them for the slopes of the loss, then one by one for the gradient.

    Args:
        model: Whose dropout must be off.
        run: Log-probs of a micro-batch, through the wrapped model.
        parts: The batch.
        fillers: Run after them, so that all processes run equally many; they change nothing.
        loss: Of the log-probs [S], in input order, to a scalar.

    Raises:
        InputError: If dropout is on: slopes would be those of other log-probs.
    """
    refuse_dropout(model)
    with torch.no_grad():
        found = [run(part) for part in parts]
        for filler in fillers:
            run(filler)
    inverse_S = inverse_of([part.place for part in parts])
    logprob_S = torch.cat(found)[inverse_S.to(found[0].device)].requires_grad_()
    (slope_S,) = torch.autograd.grad(loss(logprob_S), logprob_S)
    for part in parts:
        (run(part) * slope_S[part.place.to(slope_S.device)]).sum().backward()
    for filler in fillers:
        (run(filler) * 0.0).sum().backward()
