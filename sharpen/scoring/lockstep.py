"""Log-probs in forwards that run every module of a model once, in the model's own order.

Processes that hold a part of each weight (FSDP) gather the whole of a module's weights when the
module is called, all of them together, and let go of it afterwards. So they must call the same
modules equally often: a batch is cut into micro-batches, of which all can run the same number, and
each is one forward. The head is called as well, and read while it is.

S scored tokens of one micro-batch, R hidden rows that predict them, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sharpen.errors import InputError
from sharpen.limits import ModelLimits
from sharpen_kernels import token_logprob

from .batching import Batch, make_batches
from .forward import logits_budget, rope_boundary
from .head import Head
from .hooks import SharingError
from .packing import PackedRow, plan
from .pairs import pair_up
from .predicting import Predicting, any_shared, predicted
from .route import Route

if TYPE_CHECKING:
    import transformers

MicroBatch = PackedRow | Batch


class Lockstep:
    """Cuts batches into micro-batches, and runs each as one forward.

    Prompts are shared where the model shares them in one packed row ("tree"); a cache would take
    two forwards.

    Args:
        model: Not sharded yet: its vocabulary is read here.
        route: How to read it.
        head: What `find_route` found beside the route.
        max_tokens: Budget of a micro-batch, in padded tokens. A longer sequence runs alone.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        route: Route,
        head: Head | None,
        max_tokens: int,
    ):
        self.model, self.head = model, head
        self.shares_prompts = route.sharing == "tree"
        self.max_tokens = max_tokens if head is not None else logits_budget(model, max_tokens)
        self._limits = ModelLimits.of(model)

    def micro_batches(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> list[MicroBatch]:
        """Those that score every completion token once, on the CPU; none of no tokens.

        Raises:
            InputError: As `Scorer.score`.
        """
        pairs = pair_up(self._limits, prompts, completions)
        boundary = rope_boundary(self.model)
        if self.shares_prompts and any_shared(pairs):
            return list(plan(pairs, self.max_tokens, boundary=boundary))
        return list(make_batches(pairs, self.max_tokens, boundary=boundary))

    def filler(self, prompt: Sequence[int]) -> MicroBatch:
        """A micro-batch of one token, for who has no more while others have."""
        return self.micro_batches([prompt[:1]], [[prompt[:1]]])[0]

    def logprob(self, batch: MicroBatch, device: torch.device) -> Float[Tensor, " S"]:
        """Log-prob of each scored token of `batch`, in nats and in its order; differentiable.

        To be called inside the forward of the model, by all processes.

        Raises:
            InputError: If the model cannot share prompts in the mode that it is in.
        """
        try:
            part = predicted(self.model, batch.to(device), self.head)
        except SharingError as error:
            # other processes may not meet it, so it cannot be tried in another way
            raise InputError(
                f"prompts cannot be shared in this mode: {error}; set every dropout to 0."
            ) from error
        if self.head is not None:
            return _through_head(self.model, self.head, part)
        found = token_logprob(part.source, part.target, rows=part.rows).logprob
        assert found is not None
        return found


def _through_head(
    model: "transformers.PreTrainedModel", head: Head, part: Predicting
) -> Float[Tensor, " S"]:
    layer = model.get_output_embeddings()
    assert isinstance(layer, nn.Linear), "checked when the route was chosen"

    def forward(hidden_RD: Tensor) -> Tensor:
        found = head.layer_stats(layer, hidden_RD, part.target, rows=part.rows).logprob
        assert found is not None
        return found

    with forward_is(layer, forward):
        return layer(part.source)


@contextmanager
# a forward takes whatever its module takes
def forward_is(module: nn.Module, forward: Any) -> Iterator[None]:
    """While open, a call of `module` runs `forward` between the module's own hooks."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
