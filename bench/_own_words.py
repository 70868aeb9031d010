"""What a model itself says of a few prompts and completions, by the plainest means."""

import copy
from typing import Any

import torch

from bench._tiny_sizes import V

NEW = 12  # tokens sampled


def ids(n: int, seed: int) -> list[int]:
    """Random token ids that are no special token."""
    return torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


HEADER = ids(20, 1)
PROMPTS = [HEADER + ids(9, 2), HEADER + ids(12, 3), ids(41, 4), ids(3, 5)]
OPENING = ids(10, 6)
COMPLETIONS = [
    [OPENING + ids(n, 10 * p + n) for n in (3, 8)] + [ids(n, 99 * p + n) for n in (1, 7, 30, 12)]
    for p in range(len(PROMPTS))
]


def alone(model: Any) -> torch.Tensor:
    """Log-probs by the model's own logits, each sequence by itself."""
    found = []
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in group:
            row = torch.tensor([prompt + completion])
            logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1].double()
            target = torch.tensor(completion)[:, None]
            found.append(logits.log_softmax(-1).gather(1, target)[:, 0])
    return torch.cat(found)


def padded(model: Any) -> torch.Tensor:
    """The same by one batch a prompt, padded on the right: the model's own noise."""
    found = []
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
        longest = max(map(len, group))
        rows = [prompt + c + c[-1:] * (longest - len(c)) for c in group]
        mask = [[1] * (len(prompt) + len(c)) + [0] * (longest - len(c)) for c in group]
        logits = model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask)).logits
        for row, completion in zip(logits.double(), group, strict=True):
            own = row[len(prompt) - 1 :][: len(completion)].log_softmax(-1)
            found.append(own.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


def wide(model: Any) -> Any:
    """A copy in fp64; grouped products of experts have none."""
    copied = copy.deepcopy(model).double()
    copied.config._experts_implementation = "eager"
    copied.config.get_text_config()._experts_implementation = "eager"
    return copied


def recomputed(model: Any, prompt: list[int]) -> list[int]:
    """Greedy tokens without any cache."""
    row = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits
        row.append(int(logits[0, -1].argmax()))
    return row[len(prompt) :]
