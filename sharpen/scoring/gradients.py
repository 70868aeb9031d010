"""Gradients of a weighted sum of log-probs, in memory that does not grow with N.

    L = sum_s w[s] logprob[s]

A prompt is computed once, its graph kept; keys, values and states after it become leaves. Each
batch of completions goes on from the leaves and back to them, and is forgotten; what the leaves
have gathered goes back through the prompt in the end. Peak memory is that of the prompt's graph and
one batch, whatever the number of completions. Exact: the sum of the batches' gradients is the
gradient of the sum.

P prompt tokens, S scored tokens, R hidden rows that predict, D hidden.

Log-probs in forwards that run every module of a model once, in the model's own order.

Processes that hold a part of each weight (FSDP) gather the whole of a module's weights when the
module is called, all of them together, and let go of it afterwards. So they must call the same
modules equally often: a batch is cut into micro-batches, of which all can run the same number, and
each is one forward. The head is called as well, and read while it is.

S scored tokens of one micro-batch, R hidden rows that predict them, D hidden.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sharpen.errors import InputError
from sharpen.models import ModelLimits
from sharpen_kernels import token_logprob

from .batching import Batch, make_batches
from .hooks import SharingError
from .model_access import Head, accepted, backbone_of, input_device, logits_budget, rope_boundary
from .packing import PackedRow, plan
from .pairs import Pair, pair_up
from .prefix_cache import cache_of, continuations, groups_of, prompt_ids, rows_of, starts_of
from .probe import Route
from .token_stats import Predicting, Sharing, any_shared, predicted, predicting

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)


def accumulate(
    model: "transformers.PreTrainedModel",
    pairs: Sequence[Pair],
    weight: Float[Tensor, " S"],
    *,
    head: Head | None,
    max_tokens: int,
    sharing: Sharing,
) -> Float[Tensor, " S"]:
    """Add the gradient of L to `.grad` of every parameter; the log-probs, detached.

    Args:
        model: Run in the mode it is in.
        pairs: Prompt and completion ids; the prompt has at least one.
        weight: dL / d logprob of each scored token, end to end in input order.
        head: How to read logits off hidden rows; None takes the logits route.
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
    budget = max_tokens if head is not None else logits_budget(model, max_tokens)
    options = {"head": head, "max_tokens": budget}
    try:
        return _accumulate(model, pairs, weight, sharing, **options)
    except SharingError as error:  # before the first gradient
        logger.warning("whole sequences instead of shared prompts in this mode: %s", error)
        return _accumulate(model, pairs, weight, "none", **options)


def _accumulate(
    model: "transformers.PreTrainedModel",
    pairs: Sequence[Pair],
    weight: Tensor,
    sharing: Sharing,
    **options: Any,
) -> Tensor:
    logprob_S = torch.zeros_like(weight)
    rest: Sequence[Pair] = pairs
    place_K = torch.arange(len(weight))
    if sharing == "cache":
        groups, alone = groups_of(pairs, rope_boundary(model))
        starts = starts_of(pairs)
        for group in groups:
            for part in _continued(model, pairs, group, starts, **options):
                _backward(model, options["head"], part, weight, logprob_S)
        kept = set(alone)
        owner = [i for i, (_, completion) in enumerate(pairs) for _ in completion]
        place_K = torch.tensor([s for s, i in enumerate(owner) if i in kept], dtype=torch.int64)
        rest = [pairs[i] for i in alone]
    for part in predicting(model, rest, sharing="none", **options):
        _backward(
            model, options["head"], part._replace(place=place_K[part.place]), weight, logprob_S
        )
    return logprob_S


def refuse_dropout(model: nn.Module) -> None:
    """Refuse a model that drops at random: slopes would be those of other log-probs.

    Raises:
        InputError: If a dropout layer is on.
    """
    if any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in model.modules()):
        raise InputError(
            "`loss` must be slopes while dropout is on, got a function; set the model's dropout "
            "to 0, or put it in eval mode."
        )


def _continued(
    model: "transformers.PreTrainedModel",
    pairs: Sequence[Pair],
    group: Sequence[int],
    starts: list[int],
    *,
    head: Head | None,
    max_tokens: int,
) -> Iterator[Predicting]:
    """Batches of one prompt's completions; the prompt's own backward follows the last one."""
    module = model if head is None else backbone_of(model)
    assert module is not None, "checked when the route was chosen"
    ids = prompt_ids(pairs[group[0]][0], input_device(model))
    out = module(**accepted(module, input_ids=ids, use_cache=True))
    leaves = _Leaves()
    cache, last_D = leaves.cut_cache(cache_of(out)), leaves.cut(rows_of(out)[0, -1])
    for part in continuations(module, cache, last_D, pairs, group, starts, max_tokens):
        yield Predicting(*part)
    leaves.backward()


def _backward(
    model: "transformers.PreTrainedModel",
    head: Head | None,
    part: Predicting,
    weight: Tensor,
    logprob: Tensor,
) -> None:
    if head is not None:
        found = head.token_stats(
            model, part.source, part.target, rows=part.rows, stats=("logprob",)
        ).logprob
    else:
        rows = None if part.rows is None else part.rows.to(part.source.device)
        target = part.target.to(part.source.device)
        found = token_logprob(part.source, target, rows=rows).logprob
    assert found is not None
    place = part.place.to(weight.device)
    (found * weight[place].to(found)).sum().backward()
    logprob[place] = found.detach().to(logprob)


class _Leaves:
    """Tensors that are cut off a graph, and the gradients that they gather."""

    def __init__(self):
        self.cuts: list[tuple[Tensor, Tensor]] = []

    def cut(self, x: Tensor) -> Tensor:
        """`x` without its graph; what comes back to it waits for `backward`."""
        if not x.requires_grad:
            return x
        leaf = x.detach().requires_grad_()
        self.cuts.append((x, leaf))
        return leaf

    def cut_cache(self, cache: Any) -> Any:
        """A cache whose tensors are cut."""
        found = copy.copy(cache)
        found.layers = [self._cut_layer(layer) for layer in cache.layers]
        return found

    def _cut_layer(self, layer: nn.Module | Any) -> Any:
        found = copy.copy(layer)
        for name, value in vars(found).items():
            setattr(found, name, self._cut_value(value))
        return found

    def _cut_value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.cut(value)
        if isinstance(value, list):
            return [self._cut_value(x) for x in value]
        if isinstance(value, dict):
            return {key: self._cut_value(x) for key, x in value.items()}
        return value

    def backward(self) -> None:
        """Send what the leaves have gathered back, in one pass."""
        reached = [(x, leaf.grad) for x, leaf in self.cuts if leaf.grad is not None]
        if reached:
            tensors, gradients = zip(*reached, strict=True)
            torch.autograd.backward(tensors, gradients)


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
