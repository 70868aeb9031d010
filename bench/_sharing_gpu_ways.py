"""Log-probs and gradients of N completions of one prompt, as a GPU can hold them.

Whole sequences and caches go in parts of a number of tokens; ours and the peers each have a model
of their own, of the same parameters.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from bench._sharing import by_padded_batch, gathered
from bench._sharing_models import Prompted, model_of, twin
from sharpen import Scorer

PADDED, CACHED, ALONE = "padded batch", "DynamicCache", "ours, no sharing"
Calls = dict[str, Callable[[], Tensor]]


class Setting(NamedTuple):
    """A task's ids and models, and how many tokens a part of a batch may have."""

    problem: Prompted
    prompt: Tensor
    completions: Tensor
    ours: Any
    plain: Any
    part: int

    @property
    def lists(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        """As a scorer takes them."""
        return [self.prompt.tolist()], [self.completions.tolist()]

    @property
    def rows(self) -> int:
        """Whole sequences of a part."""
        return max(1, self.part // (self.problem.P + self.problem.C))


def setting(problem: Prompted, device: str, dtype: torch.dtype, part: int) -> Setting:
    """The task on a device."""
    model = model_of(problem.name, device, dtype)
    return Setting(problem, *problem.ids(device), twin(model), model, part)


def by_padded_parts(model: Any, prompt: Tensor, completions: Tensor, rows: int) -> Tensor:
    """Log-probs [N x C] of whole sequences, so many rows at a time."""
    return torch.cat([by_padded_batch(model, prompt, part) for part in completions.split(rows)])


def by_cache_parts(model: Any, prompt: Tensor, completions: Tensor, rows: int) -> Tensor:
    """The same from a cache of the prompt, repeated for so many rows at a time."""
    first = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
    found = []
    for part in completions.split(rows):
        cache = DynamicCache()
        for i, layer in enumerate(first.past_key_values.layers):
            repeated = (x.repeat_interleave(len(part), dim=0) for x in (layer.keys, layer.values))
            cache.update(*repeated, i)
        rest = model(input_ids=part[:, :-1], past_key_values=cache, use_cache=True).logits
        opening = first.logits.expand(len(part), 1, -1)
        found.append(gathered(torch.cat([opening, rest], dim=1), part))
    return torch.cat(found)


def forward_calls(at: Setting) -> Calls:
    """Log-probs [N x C] by each way, without gradients."""
    scorer = Scorer(at.ours, sharing="tree", max_tokens=2**17)
    alone = Scorer(at.ours, sharing="none", max_tokens=at.part)
    # the cached rows' logits are wider than their keys: as many as a padded part has
    own = at.prompt, at.completions, at.rows
    calls: Calls = {
        "ours": functools.partial(scorer.logprobs, *at.lists),
        ALONE: functools.partial(alone.logprobs, *at.lists),
        PADDED: functools.partial(by_padded_parts, at.plain, *own),
        CACHED: functools.partial(by_cache_parts, at.plain, *own),
    }
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def backward_calls(at: Setting) -> Calls:
    """Log-probs, and the gradients of their sum in every parameter, which stay."""
    scorer = Scorer(at.ours, sharing="tree", max_tokens=2**17)
    bounded = Scorer(at.ours, max_tokens=at.part)
    slopes = torch.ones(at.completions.numel(), device=at.completions.device)

    def ours() -> Tensor:
        at.ours.zero_grad()
        found = scorer.logprobs(*at.lists)
        found.sum().backward()
        return found.detach()

    def in_parts() -> Tensor:
        at.ours.zero_grad()
        return bounded.backward(*at.lists, slopes)

    def padded() -> Tensor:
        at.plain.zero_grad()
        found = []
        for part in at.completions.split(at.rows):
            one = by_padded_batch(at.plain, at.prompt, part)
            one.sum().backward()
            found.append(one.detach())
        return torch.cat(found)

    return {"ours": ours, "ours, bounded": in_parts, PADDED: padded}
