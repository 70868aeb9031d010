"""Gradients of a weighted sum of log-probs, in memory that does not grow with N.

    L = sum_s w[s] logprob[s]

A prompt is computed once, its graph kept; keys, values and states after it become leaves. Each
batch of completions goes on from the leaves and back to them, and is forgotten; what the leaves
have gathered goes back through the prompt in the end. Peak memory is that of the prompt's graph and
one batch, whatever the number of completions. Exact: the sum of the batches' gradients is the
gradient of the sum.

P prompt tokens, S scored tokens, R hidden rows that predict, D hidden.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sharpen.errors import InputError
from sharpen_kernels import token_logprob

from .forward import accepted, backbone_of, input_device, logits_budget, rope_boundary
from .head import Head
from .hooks import SharingError
from .pairs import Pair
from .predicting import Predicting, Sharing, predicting
from .prefix_cache import cache_of, continuations, groups_of, prompt_ids, rows_of, starts_of

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
