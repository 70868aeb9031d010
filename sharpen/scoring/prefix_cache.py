"""A prompt computed once into a cache, its completions continued from copies of it in batches.

The way for models whose layers carry more than keys and values from token to token (convolutions,
recurrent states): whatever is in the cache after the prompt is repeated for each completion.

P prompt tokens, B completions of one batch, L their longest, R hidden rows that predict, S scored.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .batching import PredictorBatch, plan_batches
from .hooks import SharingError
from .model_access import accepted
from .pairs import Pair

MIN_PROMPT = 16  # shorter prompts cost less than a second forward; chosen
NAMES = ("past_key_values", "cache_params")  # of a cache, in arguments and outputs


def groups_of(pairs: Sequence[Pair], boundary: int | None) -> tuple[list[list[int]], list[int]]:
    """Pairs of the same prompt that gain by its cache, and the other ones, which do not.

    A sequence above `boundary` is read at other rotary frequencies from its first token on.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, completion) in enumerate(pairs):
        if completion:
            by_prompt.setdefault(tuple(prompt), []).append(i)
    groups, alone = [], []
    for prompt, members in by_prompt.items():
        short = [
            i for i in members if boundary is None or len(prompt) + len(pairs[i][1]) - 1 <= boundary
        ]
        if len(short) < 2 or len(prompt) < MIN_PROMPT:
            short = []
        else:
            groups.append(short)
        alone += [i for i in members if i not in set(short)]
    return groups, sorted(alone)


def read_prompt(
    module: nn.Module, prompt: Sequence[int], device: torch.device
) -> tuple[Any, Float[Tensor, " D"]]:
    """The cache of a prompt, and its last row: hidden, or logits where `module` gives those.

    Raises:
        SharingError: If the forward returned no cache that can be repeated.
    """
    ids = torch.tensor([list(prompt)], device=device)
    out = module(**accepted(module, input_ids=ids, use_cache=True))
    cache = next((found for name in NAMES if (found := getattr(out, name, None))), None)
    if cache is None or not hasattr(cache, "layers") or not hasattr(cache, "reorder_cache"):
        raise SharingError(f"{type(out).__name__} holds no cache that can be repeated")
    return cache, _rows_of(out)[0, -1]


def continuations(
    module: nn.Module,
    cache: Any,
    last: Float[Tensor, " D"],
    pairs: Sequence[Pair],
    group: Sequence[int],
    starts: list[int],
    max_tokens: int,
) -> Iterator[PredictorBatch]:
    """What predicts the completions of one prompt, batch by batch.

    Args:
        module: What is run: the backbone for hidden rows, the whole model for logits.
        cache: After the prompt; stays as it is.
        last: The prompt's last row.
        pairs: Prompt and completion ids.
        group: Indices of the pairs of this prompt.
        starts: Where the tokens of each completion of `pairs` start in input order.
        max_tokens: Budget of one batch: prompt and padded completion of every row.
    """
    P = len(pairs[group[0]][0])
    lengths = [P + len(pairs[i][1]) for i in group]
    for batch in plan_batches(lengths, max_tokens):
        some = [group[b] for b in batch]
        completions = [pairs[i][1] for i in some]
        # no name for the rows: this frame would hold them while the next ones are computed
        yield _predictors(
            _read_behind(module, cache, last, P, completions),
            completions,
            [starts[i] for i in some],
        )


def _read_behind(
    module: nn.Module,
    cache: Any,
    last: Float[Tensor, " D"],
    P: int,
    completions: list[list[int]],
) -> Float[Tensor, "R D"]:
    """The prompt's last row, then those of completions read behind copies of its cache."""
    read = [completion[:-1] for completion in completions]
    B, L, device = len(read), max(map(len, read)), last.device
    if L == 0:
        return last[None]
    ids = [x + [full[-1]] * (L - len(x)) for x, full in zip(read, completions, strict=True)]
    mask_BL = torch.tensor([[1] * len(x) + [0] * (L - len(x)) for x in read], device=device)
    out = module(
        **accepted(
            module,
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.cat([mask_BL.new_ones(B, P), mask_BL], dim=1),
            position_ids=torch.arange(P, P + L, device=device).expand(B, L),
            use_cache=True,
            **dict.fromkeys(NAMES, fork(cache, B)),
        )
    )
    return torch.cat([last[None], _rows_of(out).flatten(0, 1)])


def _predictors(
    rows: Float[Tensor, "R D"], completions: list[list[int]], starts: list[int]
) -> PredictorBatch:
    """Who reads the rows of `_read_behind`: the first token of each completion the first row."""
    L = max(map(len, completions)) - 1
    row_index, target, output = [], [], []
    for b, (completion, start) in enumerate(zip(completions, starts, strict=True)):
        first = 1 + b * L
        row_index += [0, *range(first, first + len(completion) - 1)]
        target += completion
        output += range(start, start + len(completion))
    device = rows.device
    return PredictorBatch(
        rows,
        torch.tensor(row_index, device=device),
        torch.tensor(target, device=device),
        torch.tensor(output),
    )


def fork(cache: Any, n: int) -> Any:
    """A cache of `n` rows that all continue from the one row of `cache`, which stays as it is."""
    # lists and dicts of its own: updates replace what these hold
    forked = _rebuilt(cache, lambda x: copy.copy(x) if isinstance(x, (list, dict)) else x)
    forked.reorder_cache(torch.zeros(n, dtype=torch.int64))
    return forked


class DetachedInputs:
    """Tensors that are cut off a graph, and the gradients that they gather."""

    def __init__(self):
        self.cuts: list[tuple[Tensor, Tensor]] = []

    def detach(self, x: Tensor) -> Tensor:
        """`x` without its graph; what comes back to it waits for `backward`."""
        if not x.requires_grad:
            return x
        leaf = x.detach().requires_grad_()
        self.cuts.append((x, leaf))
        return leaf

    def detach_cache(self, cache: Any) -> Any:
        """A cache whose tensors are detached."""
        return _rebuilt(cache, self._detach_value)

    def _detach_value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.detach(value)
        if isinstance(value, list):
            return [self._detach_value(x) for x in value]
        if isinstance(value, dict):
            return {key: self._detach_value(x) for key, x in value.items()}
        return value

    def backward(self) -> None:
        """Send what the inputs have gathered back, in one pass."""
        reached = [(x, leaf.grad) for x, leaf in self.cuts if leaf.grad is not None]
        if reached:
            tensors, gradients = zip(*reached, strict=True)
            torch.autograd.backward(tensors, gradients)


def _rebuilt(cache: Any, change: Callable[[Any], Any]) -> Any:
    """A cache whose layers hold what `change` makes of what those of `cache` hold."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in found.layers:
        for name, value in vars(layer).items():
            setattr(layer, name, change(value))
    return found


def _rows_of(out: Any) -> Tensor:
    """The hidden rows, or the logits, that a forward returned."""
    found = getattr(out, "last_hidden_state", None)
    return out.logits if found is None else found
