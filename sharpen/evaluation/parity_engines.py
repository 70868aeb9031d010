"""Log-probs of given completions by engines other than ours, one log-prob a token."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sharpen.errors import InputError
from sharpen.sampling.endpoint_client import EndpointClient, EndpointError
from sharpen.sampling.side_by_side import side_by_side
from sharpen.scoring.forward import evaluating, input_device

if TYPE_CHECKING:
    import transformers

Prompts = Sequence[Sequence[int]]
Completions = Sequence[Sequence[Sequence[int]]]


def forward_logprobs(
    model: "transformers.PreTrainedModel", prompts: Prompts, completions: Completions
) -> list[list[list[float]]]:
    """Of a plain forward of transformers: each sequence whole and alone, log-softmax in fp32.

    The logits of one sequence are held at a time.
    """
    device = input_device(model)

    def one(prompt: Sequence[int], completion: Sequence[int]) -> list[float]:
        if not completion:
            return []
        ids = torch.tensor([[*prompt, *completion]], device=device)
        logits_TV = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        target_T = ids[0, len(prompt) :, None].to(logits_TV.device)
        return logits_TV.float().log_softmax(dim=1).gather(1, target_T)[:, 0].tolist()

    with torch.no_grad(), evaluating(model):
        return [
            [one(prompt, completion) for completion in group]
            for prompt, group in zip(prompts, completions, strict=True)
        ]


def server_logprobs(
    client: EndpointClient,
    model: str,
    prompts: Prompts,
    completions: Completions,
    *,
    concurrency: int = 8,
    progress: Callable[[int], object] = lambda n: None,
) -> list[list[list[float]]]:
    """Of a completions endpoint, asked to echo prompt and completion as token ids with log-probs.

    Args:
        client: Where it is.
        model: Its name there.
        prompts: Token ids.
        completions: Token ids.
        concurrency: Requests at a time.
        progress: Told 1 for each sequence answered.

    Raises:
        EndpointError: If it does not answer, or not with a log-prob of each token, a number.
    """
    pairs = [
        (i, prompt, completion)
        for i, (prompt, completion) in enumerate(
            (prompt, completion)
            for prompt, group in zip(prompts, completions, strict=True)
            for completion in group
        )
    ]

    def ask(item: tuple[int, Sequence[int], Sequence[int]]) -> list[float]:
        _, prompt, completion = item
        body = {
            "model": model,
            "prompt": [*prompt, *completion],
            "echo": True,
            # some servers refuse 0; what they add is cut off
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": 1,
        }
        answer = client.post("/completions", body)
        return _echoed(client.url, answer, len(prompt), len(completion))

    found: dict[int, list[float]] = {}
    for item, result in side_by_side(ask, pairs, concurrency):
        if isinstance(result, Exception):
            raise result
        found[item[0]] = result
        progress(1)
    flat = (found[i] for i in itertools.count())
    return [[next(flat) for _ in group] for group in completions]


def _echoed(url: str, answer: dict[str, Any], n_prompt: int, n_completion: int) -> list[float]:
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    logprobs = choice.get("logprobs") if isinstance(choice, dict) else None
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    end = n_prompt + n_completion
    # one more where the server had to generate
    if not isinstance(values, list) or len(values) not in (end, end + 1):
        got = "none" if not isinstance(values, list) else str(len(values))
        raise EndpointError(
            f"`endpoint` {url}: must echo {end} tokens with their log-probs, got {got}; use a "
            "server that takes token ids, `echo` and `logprobs`."
        )
    found = []
    for i, value in enumerate(values[n_prompt:end], n_prompt):
        number = _nats(value)
        if number is None:
            raise EndpointError(
                f"`endpoint` {url}: `token_logprobs`[{i}] must be a number or null, got {value!r}; "
                "use a server that answers as OpenAI's completions do."
            )
        found.append(number)
    return found


def kept_logprobs(places: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[list[list[float]]]:
    """Those that the sampler kept, from records of `sharpen sample`; null is NaN.

    Args:
        places: Where each record stands.
        rows: The records.

    Raises:
        InputError: If a record has none, or something else among them.
    """
    kept = []
    for place, row in zip(places, rows, strict=True):
        groups = row.get("logprobs")
        if "completion" in row and isinstance(groups, list):
            groups = [groups]
        if not isinstance(groups, list) or not all(isinstance(group, list) for group in groups):
            raise InputError(
                f"{place}: must have the sampler's own `logprobs`; give a file of "
                "`sharpen sample`, or another `--against`."
            )
        kept.append([_numbers(f"{place}: `logprobs`[{g}]", ids) for g, ids in enumerate(groups)])
    return kept


def _numbers(name: str, values: Sequence[Any]) -> list[float]:
    found = []
    for i, value in enumerate(values):
        number = _nats(value)
        if number is None:
            raise InputError(
                f"{name}[{i}] must be a number or null, got {value!r}; give the file as "
                "`sharpen sample` wrote it."
            )
        found.append(number)
    return found


# JSON of others
def _nats(value: Any) -> float | None:
    """A log-prob, NaN for null; None if it is neither."""
    if value is None:
        return float("nan")
    # bool is an int to Python alone
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)
