"""Padded batches under a token budget: whole sequences, or completions behind a prompt's cache.

S scored tokens, B sequences and L padded length of one batch, P prompt tokens, R rows that predict.

A whole sequence is the prompt followed by the completion without its last token: hidden row t
predicts token t + 1, so the last token is predicted and never read. Each row is padded on the
right with an id of its own: a causal model never sees it from the tokens that count, and a model
whose embedding of some id is NaN keeps the NaN to the rows that use that id.

A prompt that several completions follow can be computed once into a cache, and they continue from
copies of it. The way for models whose layers carry more than keys and values from token to token
(convolutions, recurrent states): whatever is in the cache is repeated for each completion.

The plan depends on the lengths and the budget alone, and every scored token carries its index in
input order, so the inverse is exact whatever the plan.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .hooks import SharingError
from .model_access import accepted
from .pairs import Pair, token_starts

MIN_PROMPT = 16  # shorter prompts cost less than a second forward; chosen
NAMES = ("past_key_values", "cache_params")  # of a cache, in arguments and outputs


@dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences, padded, and where their scored tokens are.

    Attributes:
        ids: Token ids, each row filled up with its own last id.
        mask: 1 on tokens, 0 on padding.
        rows: Which row of the hidden states, flattened to [B * L, D], predicts each scored token.
        target: The id of each scored token.
        output_index: Where each scored token stands in input order.
    """

    ids: Int64[Tensor, "B L"]
    mask: Int64[Tensor, "B L"]
    rows: Int64[Tensor, " S"]
    target: Int64[Tensor, " S"]
    output_index: Int64[Tensor, " S"]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; `output_index` stays where it is."""
        moved = {name: x.to(device) for name, x in vars(self).items() if name != "output_index"}
        return replace(self, **moved)


class PredictorBatch(NamedTuple):
    """What one forward predicts some scored tokens from: hidden rows, or logits."""

    rows: Tensor  # [R, D] or [R, V]
    row_index: Tensor | None  # [S] the row that predicts each token; None: row s token s
    target: Tensor  # [S]
    output_index: Tensor  # [S] on the CPU: where each token stands in input order


def plan_batches(
    lengths: Sequence[int], max_tokens: int, *, boundary: int | None = None
) -> list[list[int]]:
    """Indices of `lengths` grouped so that rows x longest of a group is at most `max_tokens`.

    Longest first, so that the batch that needs the most memory comes first; ties by index. A
    length above the budget gets a group of its own. A length of 0 is left out.

    Args:
        lengths: Tokens of each sequence.
        max_tokens: Budget of one group, in padded tokens.
        boundary: Lengths up to it and lengths above it never share a group.
    """
    order = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    for i in order:
        longest = lengths[groups[-1][0]] if groups else 0
        crosses = boundary is not None and lengths[i] <= boundary < longest
        if groups and not crosses and (len(groups[-1]) + 1) * longest <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def make_batches(
    pairs: Sequence[Pair],
    max_tokens: int,
    *,
    chosen: Sequence[int] | None = None,
    boundary: int | None = None,
) -> Iterator[Batch]:
    """The batches that score every completion token of `pairs` once, on the CPU.

    An empty completion has nothing to score and is in no batch.

    Args:
        pairs: Prompt and completion ids.
        max_tokens: Budget of one batch, in padded tokens.
        chosen: Indices of the pairs to take, ascending; None for all.
        boundary: Sequences of up to so many tokens and longer ones never share a batch.
    """
    starts = token_starts(pairs)
    taken = range(len(pairs)) if chosen is None else chosen
    lengths = [len(pairs[i][0]) + len(pairs[i][1]) - 1 if pairs[i][1] else 0 for i in taken]
    for group in plan_batches(lengths, max_tokens, boundary=boundary):
        members = [taken[k] for k in group]
        yield _pad([pairs[i] for i in members], [starts[i] for i in members])


def inverse_of(places: Sequence[Int64[Tensor, " _"]]) -> Int64[Tensor, " S"]:
    """The index that puts the scored tokens of all batches, end to end, into input order."""
    if not places:
        return torch.zeros(0, dtype=torch.int64)
    output_S = torch.cat(list(places))
    inverse_S = torch.empty_like(output_S)
    inverse_S[output_S] = torch.arange(len(output_S))
    return inverse_S


def _pad(pairs: list[Pair], starts: list[int]) -> Batch:
    sequences = [prompt + completion[:-1] for prompt, completion in pairs]
    ids, mask = _padded(sequences, [sequence[-1] for sequence in sequences])
    L = len(ids[0])
    rows, target, output = [], [], []
    for b, ((prompt, completion), start) in enumerate(zip(pairs, starts, strict=True)):
        first = b * L + len(prompt) - 1
        rows += range(first, first + len(completion))
        target += completion
        output += range(start, start + len(completion))
    return Batch(*(torch.tensor(x, dtype=torch.int64) for x in (ids, mask, rows, target, output)))


def _padded(sequences: list[list[int]], fill: list[int]) -> tuple[list[list[int]], list[list[int]]]:
    """Sequences of one length, each filled up with an id of its own, and their mask."""
    L = max(map(len, sequences))
    ids = [x + [own] * (L - len(x)) for x, own in zip(sequences, fill, strict=True)]
    return ids, [[1] * len(x) + [0] * (L - len(x)) for x in sequences]


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
        alone += set(members) - set(short)
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
    if not any(read):
        return last[None]
    ids, mask = _padded(read, [completion[-1] for completion in completions])
    device = last.device
    mask_BL = torch.tensor(mask, device=device)
    B, L = mask_BL.shape
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
