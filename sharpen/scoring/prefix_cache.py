"""A prompt computed once into a cache, its completions continued from copies of it in batches.

The way for models whose layers carry more than keys and values from token to token (convolutions,
recurrent states): whatever is in the cache after the prompt is repeated for each completion.

P prompt tokens, B completions of one batch, L their longest, R hidden rows that predict, S scored.
"""

import copy
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from .batching import plan_batches
from .hooks import SharingError
from .model_access import accepted, input_device
from .pairs import Pair

if TYPE_CHECKING:
    import transformers

MIN_PROMPT = 16  # shorter prompts cost less than a second forward; chosen
NAMES = ("past_key_values", "cache_params")  # of a cache, in arguments and outputs
Part = tuple[Float[Tensor, "R _"], Int64[Tensor, " S"], Int64[Tensor, " S"], Int64[Tensor, " S"]]


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


def cached_parts(
    model: "transformers.PreTrainedModel",
    module: nn.Module,
    pairs: Sequence[Pair],
    groups: Sequence[Sequence[int]],
    max_tokens: int,
) -> Iterator[Part]:
    """Rows that predict, the row and id of each scored token, and its place in input order.

    Args:
        model: Where token ids go.
        module: What is run: the backbone for hidden rows, the whole model for logits.
        pairs: Prompt and completion ids.
        groups: Indices of pairs with one prompt each.
        max_tokens: Budget of one batch: prompt and padded completion of every row.
    """
    starts, device = starts_of(pairs), input_device(model)
    for group in groups:
        ids = prompt_ids(pairs[group[0]][0], device)
        out = module(**accepted(module, input_ids=ids, use_cache=True))
        cache, last_D = cache_of(out), rows_of(out)[0, -1]
        yield from continuations(module, cache, last_D, pairs, group, starts, max_tokens)


def starts_of(pairs: Sequence[Pair]) -> list[int]:
    """Where the tokens of each completion start in input order, then their number."""
    return [0, *accumulate(len(completion) for _, completion in pairs)]


def continuations(
    module: nn.Module,
    cache: Any,
    last: Float[Tensor, " D"],
    pairs: Sequence[Pair],
    group: Sequence[int],
    starts: list[int],
    max_tokens: int,
) -> Iterator[Part]:
    """`cached_parts` of one prompt, whose cache and last row are there."""
    P = len(pairs[group[0]][0])
    lengths = [P + len(pairs[i][1]) for i in group]
    for batch in plan_batches(lengths, max_tokens):
        some = [group[b] for b in batch]
        yield _part(module, cache, last, P, [pairs[i][1] for i in some], starts, some)


def _part(
    module: nn.Module,
    cache: Any,
    last: Float[Tensor, " D"],
    P: int,
    completions: list[list[int]],
    starts: list[int],
    indices: list[int],
) -> Part:
    read = [completion[:-1] for completion in completions]
    L = max(map(len, read))
    device = last.device
    rows, target, place = [], [], []
    for b, (completion, i) in enumerate(zip(completions, indices, strict=True)):
        first = 1 + b * L
        rows += [0, *range(first, first + len(completion) - 1)]
        target += completion
        place += range(starts[i], starts[i] + len(completion))
    source_RD = last[None]
    if L > 0:
        B = len(read)
        ids_BL = _ids([x + [completions[b][-1]] * (L - len(x)) for b, x in enumerate(read)], device)
        mask_BL = torch.tensor([[1] * len(x) + [0] * (L - len(x)) for x in read], device=device)
        seen_BP = mask_BL.new_ones(B, P)
        positions_BL = torch.arange(P, P + L, device=device).expand(B, L)
        out = module(
            **accepted(
                module,
                input_ids=ids_BL,
                attention_mask=torch.cat([seen_BP, mask_BL], dim=1),
                position_ids=positions_BL,
                use_cache=True,
                **dict.fromkeys(NAMES, fork(cache, B)),
            )
        )
        source_RD = torch.cat([source_RD, rows_of(out).flatten(0, 1)])
    return (
        source_RD,
        torch.tensor(rows, device=device),
        torch.tensor(target, device=device),
        torch.tensor(place),
    )


def fork(cache: Any, n: int) -> Any:
    """A cache of `n` rows that all continue from the one row of `cache`, which stays as it is."""
    forked = copy.copy(cache)
    forked.layers = [_copy(layer) for layer in cache.layers]
    forked.reorder_cache(torch.zeros(n, dtype=torch.int64))
    return forked


def _copy(layer: Any) -> Any:
    """The same tensors in a layer and lists of its own: updates replace what these hold."""
    copied = copy.copy(layer)
    for name, value in vars(copied).items():
        if isinstance(value, (list, dict)):
            setattr(copied, name, copy.copy(value))
    return copied


def cache_of(out: Any) -> Any:
    """The cache that a forward returned.

    Raises:
        SharingError: If it returned none that can be repeated.
    """
    cache = next((found for name in NAMES if (found := getattr(out, name, None))), None)
    if cache is None or not hasattr(cache, "layers") or not hasattr(cache, "reorder_cache"):
        raise SharingError(f"{type(out).__name__} holds no cache that can be repeated")
    return cache


def rows_of(out: Any) -> Tensor:
    """The hidden rows, or the logits, that a forward returned."""
    found = getattr(out, "last_hidden_state", None)
    return out.logits if found is None else found


def prompt_ids(prompt: Sequence[int], device: torch.device) -> Int64[Tensor, "1 P"]:
    """One row of token ids."""
    return _ids([list(prompt)], device)


def _ids(rows: list[list[int]], device: torch.device) -> Int64[Tensor, "B L"]:
    return torch.tensor(rows, device=device)
