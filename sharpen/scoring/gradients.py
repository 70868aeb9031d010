"""Gradients of log-probs: in memory that does not grow with N, or in forwards that FSDP can follow.

Memory-bounded backward (`accumulate`) of a weighted sum of log-probs:

    L = sum_s w[s] logprob[s]

A prompt is computed once, its graph kept (`DetachedInputs`); each batch of completions goes back to
the end of it, and is forgotten; what they have gathered goes back through the prompt in the end.
Peak memory is that of the prompt's graph and one batch, whatever the number of completions. Exact:
the sum of the batches' gradients is the gradient of the sum.

Uniform micro-batches (`UniformMicroBatches`): processes that hold a part of each weight (FSDP)
gather the whole of a module's weights when the module is called, all of them together, and let go
of it afterwards. So they must call the same modules equally often: a batch is cut into
micro-batches, of which all can run the same number, and each is one forward that runs every module
of a model once, in the model's own order. The head is called as well, and read while it is.

P prompt tokens, S scored tokens, D hidden.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sharpen.errors import InputError
from sharpen.models import ModelLimits

from .batching import Batch, make_batches
from .hooks import SharingError
from .model_access import Head, rope_boundary
from .packing import PackedRow, plan
from .pairs import Group, Ids, Pair, pair_up
from .probe import Route
from .token_stats import ScoringPath, Sharing, predictor_batches, scoring_path, shared_or_whole

if TYPE_CHECKING:
    import transformers

MicroBatch = PackedRow | Batch


def accumulate(
    path: ScoringPath,
    pairs: Sequence[Pair],
    weight: Float[Tensor, " S"],
    *,
    max_tokens: int,
    sharing: Sharing,
) -> Float[Tensor, " S"]:
    """Add the gradient of L to `.grad` of every parameter; the log-probs, detached.

    Args:
        path: Of the model, in the mode it is in.
        pairs: Prompt and completion ids; the prompt has at least one.
        weight: dL / d logprob of each scored token, end to end in input order.
        max_tokens: Budget of one batch, in padded tokens, prompt and completion of every row.
        sharing: "cache" goes on from one prompt; "none" takes whole sequences, batch by batch.

    Raises:
        InputError: If `weight` has another shape.
    """
    n = sum(len(completion) for _, completion in pairs)
    if weight.shape != (n,):
        raise InputError(
            f"`loss` must hold a slope for each of the {n} completion tokens, got shape "
            f"{tuple(weight.shape)}; repeat those of a completion for its tokens."
        )
    weight = weight.detach()
    budget = path.budget(max_tokens)

    def run(way: Sharing) -> Tensor:
        logprob_S = torch.zeros_like(weight)
        for batch in predictor_batches(path, pairs, budget, way, cut_prompts=True):
            found = path.stats(batch, ("logprob",)).logprob
            assert found is not None
            index = batch.output_index.to(weight.device)
            (found * weight[index].to(found)).sum().backward()
            logprob_S[index] = found.detach().to(logprob_S)
            # no graph is held while the next batch is computed
            del batch, found
        return logprob_S

    # a model that cannot share says so before the first gradient
    return shared_or_whole(run, sharing)


def refuse_dropout(model: nn.Module) -> None:
    """Reject a model that drops at random: slopes would be those of other log-probs."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in model.modules()):
        raise InputError(
            "`loss` must be slopes while dropout is on, got a function; set the model's dropout "
            "to 0, or put it in eval mode."
        )


class UniformMicroBatches:
    """Cuts batches into micro-batches, and runs each as one forward.

    Prompts are shared where the model shares them in one packed row ("tree"); a cache would take
    two forwards.

    Args:
        model: Not sharded yet: its vocabulary is read here.
        route: How to read it.
        head: What `probe_model` found beside the route.
        max_tokens: Budget of a micro-batch, in padded tokens. A longer sequence runs alone.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        route: Route,
        head: Head | None,
        max_tokens: int,
    ):
        self.model = model
        self.path = scoring_path(model, head)
        self.shares_prompts = route.sharing == "tree"
        self.max_tokens = 1 if route.sharing == "alone" else self.path.budget(max_tokens)
        self._limits = ModelLimits.of(model)

    def micro_batches(
        self, prompts: Sequence[Ids], completions: Sequence[Group]
    ) -> list[MicroBatch]:
        """Those that score every completion token once, on the CPU; none of no tokens.

        Raises:
            InputError: As `Scorer.score`.
        """
        pairs = pair_up(self._limits, prompts, completions)
        boundary = rope_boundary(self.model)
        if self.shares_prompts:
            rows = plan(pairs, self.max_tokens, boundary=boundary)
            if rows.shares:
                return list(rows)
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
            predictors = self.path.predict(batch.to(device))
        except SharingError as error:
            # other processes may not meet it, so it cannot be tried in another way
            raise InputError(
                f"prompts cannot be shared in this mode: {error}; set every dropout to 0."
            ) from error
        return self.path.logprob_in_call(predictors)
