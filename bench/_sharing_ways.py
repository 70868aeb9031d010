"""Log-probs and gradients of N completions of one prompt, by each way.

Ours and the peers each have a model of their own with the same weights, so that no hook of ours is
in the way of a peer.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench._sharing import Problem, V, by_padded_batch, gathered
from sharpen import Scorer

WAYS = {"ours, auto": "auto", "ours, tree": "tree", "ours, cache": "cache"}
PADDED, CACHED, BOUNDED = "padded batch", "DynamicCache", "ours, bounded"

Ways = dict[str, Callable[[], Tensor]]


def by_cache(model: Any, prompt: Tensor, completions: Tensor) -> Tensor:
    """The same from a DynamicCache of the prompt, repeated for its completions."""
    N = len(completions)
    first = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
    cache = first.past_key_values
    cache.batch_repeat_interleave(N)
    rest = model(input_ids=completions[:, :-1], past_key_values=cache, use_cache=True).logits
    return gathered(torch.cat([first.logits.expand(N, 1, V), rest], dim=1), completions)


def forward_ways(problem: Problem, ours: Any, plain: Any) -> Ways:
    """Log-probs [N x C] by each way; differentiable. Routes of ours are found here."""
    prompt, completions = problem.ids()
    lists = [prompt.tolist()], [completions.tolist()]
    ways: Ways = {}
    for name, way in WAYS.items():
        scorer = Scorer(ours, sharing=way, max_tokens=2**17)
        assert scorer.route.sharing == ("tree" if way == "auto" else way)
        ways[name] = functools.partial(scorer.logprobs, *lists)
    ways[PADDED] = functools.partial(by_padded_batch, plain, prompt, completions)
    ways[CACHED] = functools.partial(by_cache, plain, prompt, completions)
    return ways


def backward_ways(problem: Problem, ours: Any, plain: Any) -> Ways:
    """Log-probs, and the gradients of their sum in every parameter."""
    prompt, completions = problem.ids()
    # four rows at a time
    scorer = Scorer(ours, max_tokens=4 * (problem.P + problem.C))
    lists = [prompt.tolist()], [completions.tolist()]
    slopes = torch.ones(completions.numel())
    scorer.backward(*lists, slopes)

    def step(model: Any, way: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        found = way()
        found.sum().backward()
        return found.detach()

    def in_parts() -> Tensor:
        ours.zero_grad()
        return scorer.backward(*lists, slopes)

    ways = forward_ways(problem, ours, plain)
    of = {name: ours if name in WAYS else plain for name in ways}
    steps: Ways = {n: functools.partial(step, of[n], way) for n, way in ways.items()}
    return {**steps, BOUNDED: in_parts}
