"""Decode N completions of each prompt: on one copy of its keys and values, or without a cache.

`decode`                 a prompt is read once, and rows that ended cost nothing
`decode_without_cache`   every token reads its whole sequence again: any causal model, and slower
`find_decoding`          whether `decode` is right for a model: tried on random tokens

B rows, A of them that are active, C that stay so, G prompts of P tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharpen.models import ModelLimits
from sharpen.scoring.hooks import under
from sharpen.scoring.model_access import accepted, evaluating, rope_boundary
from sharpen.scoring.probe import ReferenceScores, try_route

from .prompt_cache import PromptCache, PromptPlan, StepPlan

Decoding = Literal["shared", "generate"]
HALF_TRIES = 3

# active rows and their logits [A, V] to the next token of each [A], and which of them stay active
# [C]: places among the active rows, prompt by prompt, a row as often as it is continued
Take = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def decode(
    model: PreTrainedModel, prompts: Int64[Tensor, "G P"], counts: Sequence[int], take: Take
) -> None:
    """Run `counts[g]` rows of each prompt until `take` leaves none active.

    Args:
        model: In eval mode, with the hooks installed.
        prompts: Token ids of prompts of one length.
        counts: Rows of each prompt, at least one.
        take: Called with the numbers of the active rows and their logits; chooses their tokens.
    """
    cache, first_GV = read_prompts(model, prompts)
    device = first_GV.device
    cache.fork(counts, device)
    owner_B = torch.repeat_interleave(torch.tensor(list(counts)))
    rows_A = torch.arange(len(owner_B), device=device)
    logits_AV = first_GV[owner_B.to(device)]
    while True:
        token_A, active_C = take(rows_A, logits_AV)
        active = active_C.tolist()
        if not active:
            return
        if active != list(range(len(rows_A))):
            cache.keep(active)
            rows_A, token_A = rows_A[active_C], token_A[active_C]
        with under(StepPlan(cache)):
            logits_AV = next_logits(model, token_A[:, None], cache)


def decode_without_cache(
    model: PreTrainedModel, prompts: Int64[Tensor, "G P"], counts: Sequence[int], take: Take
) -> None:
    """`decode` without a cache and without hooks: right for any causal model, and slower.

    A row of P + T tokens costs about (P + T) T instead of P + T.

    Args:
        model: In eval mode.
        prompts: As for `decode`.
        counts: As for `decode`.
        take: As for `decode`.
    """
    device = prompts.device
    ids_AL = prompts.repeat_interleave(torch.tensor(list(counts), device=device), dim=0)
    rows_A = torch.arange(len(ids_AL), device=device)
    while True:
        token_A, active_C = take(rows_A, logits_of_whole(model, ids_AL))
        if not len(active_C):
            return
        rows_A = rows_A[active_C]
        ids_AL = torch.cat([ids_AL[active_C], token_A[active_C, None]], dim=1)


def read_prompts(
    model: PreTrainedModel, prompts: Int64[Tensor, "G P"]
) -> tuple[PromptCache, Float[Tensor, "G V"]]:
    """A cache of prompts of one length, and the logits of what follows each."""
    cache = PromptCache()
    with under(PromptPlan(cache)):
        return cache, next_logits(model, prompts, cache)


def next_logits(model: PreTrainedModel, ids: Tensor, cache: PromptCache) -> Float[Tensor, "A V"]:
    """Logits behind further tokens `ids` of each row; the model is under a plan of the cache."""
    seen, n = cache.get_seq_length(), ids.shape[1]
    position_ids = torch.arange(seen, seen + n, device=ids.device).expand(ids.shape)
    options = accepted(model, position_ids=position_ids, logits_to_keep=1)
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
    return out.logits[:, -1]


def logits_of_whole(model: PreTrainedModel, ids: Int64[Tensor, "A L"]) -> Float[Tensor, "A V"]:
    """Logits behind whole sequences, without a cache."""
    options = accepted(model, use_cache=False, logits_to_keep=1)
    return model(input_ids=ids, **options).logits[:, -1]


def crosses_rope_boundary(model: PreTrainedModel, P: int, longest: int) -> bool:
    """Whether keys of a prompt of P tokens are turned otherwise in the longest sequence."""
    boundary = rope_boundary(model)
    return boundary is not None and P <= boundary < longest


def find_decoding(model: PreTrainedModel) -> tuple[Decoding, str]:
    """Whether decoding on shared prompts gives the logits of each row alone; and why, in words.

    Tried on a few random tokens, in eval mode. Leaves the hooks in the model if it is right.
    """

    def attempt() -> str | None:
        why = None
        with torch.no_grad(), evaluating(model), torch.compiler.set_stance("force_eager"):
            # rounding may send a token to another expert: in half precision, not every time
            for seed in range(1 if torch.finfo(model.dtype).bits >= 32 else HALF_TRIES):
                why = _fault(model, seed)
                if why is None:
                    break
        return why

    why = try_route(model, attempt)
    return ("shared", "it decodes as each row alone") if why is None else ("generate", why)


def _fault(model: PreTrainedModel, seed: int) -> str | None:
    """What is wrong with `decode` of two prompts of random tokens, one of three rows."""
    limits = ModelLimits.of(model)
    room = 32 if limits.max_length is None else min(32, limits.max_length)
    P, n_steps, counts = room // 2, room - room // 2 - 1, (3, 1)
    if P < 1 or n_steps < 2:
        return f"its context of {room} tokens is too short to try"
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        found = torch.randint(limits.vocab_size, shape, generator=generator)
        return found.to(model.device)

    prompts_GP, tokens_BT = ids(len(counts), P), ids(sum(counts), n_steps)
    # the second row ends halfway
    last_B = [n_steps, n_steps // 2, n_steps, n_steps]
    got: dict[tuple[int, int], Tensor] = {}
    step = 0

    def take(rows_A: Tensor, logits_AV: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal step
        for row, logits_V in zip(rows_A.tolist(), logits_AV, strict=True):
            got[row, step] = logits_V.float().log_softmax(0)
        stays_A = torch.tensor([step + 1 < last_B[r] for r in rows_A.tolist()])
        step += 1
        return tokens_BT[rows_A, step - 1], stays_A.nonzero().flatten().to(rows_A.device)

    decode(model, prompts_GP, counts, take)
    owner = [g for g, count in enumerate(counts) for _ in range(count)]
    whole = [
        torch.cat([prompts_GP[g], tokens_BT[row, : last_B[row] - 1]])[None]
        for row, g in enumerate(owner)
    ]

    def alone() -> Tensor:
        logits = [model(input_ids=ids, use_cache=False).logits[0, P - 1 :] for ids in whole]
        return torch.cat(logits).float().log_softmax(1)

    truth = ReferenceScores(model, alone)
    truth.allow(torch.cat([_by_own_cache(model, ids, P) for ids in whole]))
    return truth.mismatch(
        torch.stack([got[row, t] for row in range(len(owner)) for t in range(last_B[row])])
    )


def _by_own_cache(model: PreTrainedModel, ids: Tensor, P: int) -> Tensor:
    """The same log-probs by transformers' own cache, a token at a time."""
    out = model(input_ids=ids[:, :P], use_cache=True)
    found = [out.logits[0, -1]]
    for t in range(P, ids.shape[1]):
        past = out.past_key_values
        out = model(input_ids=ids[:, t : t + 1], past_key_values=past, use_cache=True)
        found.append(out.logits[0, -1])
    return torch.stack(found).float().log_softmax(1)
