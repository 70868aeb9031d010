"""One model type of `bench/support.py`: is it scored and sampled as the model itself says?"""

import copy
import dataclasses
from typing import Any

import torch
import transformers

from bench._tiny_models import tiny_model
from bench._tiny_sizes import V
from sharpen import Scorer
from sharpen.errors import SharpenError
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.hf import TransformersSampler

FLOOR_NATS = 2e-5
NOISE_FACTOR = 8  # of what fp32 costs the model itself
WRONG_NATS = 1e-3  # more is no rounding
NEW = 12  # tokens sampled


@dataclasses.dataclass
class Found:
    """What came of one type; `verdict` is "right", "wrong", "refused" or "not built"."""

    model_type: str
    verdict: str
    why: str = ""
    sharing: str = "-"
    head: str = "-"
    sampling: str = "-"
    error: float | None = None
    noise: float | None = None


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


def examine(model_type: str) -> Found:
    """Build, find routes, compare."""
    try:
        model = tiny_model(model_type)
        with torch.no_grad():
            want = alone(model)
    except Exception as error:  # of someone else's code, on sizes it was not made for
        return Found(model_type, "not built", reason(error))
    found = Found(model_type, "right")
    try:
        with torch.no_grad():
            scorer = Scorer(model)
            got = scorer.score(PROMPTS, COMPLETIONS).tokens.logprob
            assert got is not None
            found.sharing, found.head = scorer.route
        found.error = (got.double() - want).abs().max().item()
        found.noise = noise_of(model, want)
        if not found.error <= max(FLOOR_NATS, NOISE_FACTOR * found.noise):
            found.verdict, found.why = "wrong", "scores"
        found.sampling, same = greedy(model)
        if not same:
            found.verdict, found.why = "wrong", "greedy tokens"
    except SharpenError as error:
        found.verdict, found.why = "refused", reason(error)
    except Exception as error:  # the same
        found.verdict, found.why = "refused", f"raises {reason(error)}"
    return found


def noise_of(model: Any, want: torch.Tensor) -> float:
    """What fp32 costs the model itself: by a padded batch of its own, and beside fp64.

    Either counts as 0 where the model cannot do it, or is not right (some read their padding).
    """
    found = [0.0]
    for way in (padded, lambda m: alone(copy.deepcopy(m).double())):
        try:
            with torch.no_grad():
                found.append((way(model) - want).abs().max().item())
        except Exception:  # of someone else's code
            continue
    return max(x for x in found if x < WRONG_NATS)


def greedy(model: Any) -> tuple[str, bool]:
    """The sampler's way, and whether its greedy tokens are those of `generate`.

    Or of the model run on whole sequences: some `generate` from a cache that is not their own.
    """
    sampler = TransformersSampler(model, _NoText())  # type: ignore[arg-type]
    sampler.eos_ids = ()
    prompts = [Prompt(str(i), "", tuple(p), str(i)) for i, p in enumerate(PROMPTS)]
    config = SamplingConfig(n=2, temperature=0.0, max_new_tokens=NEW)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    same = True
    for batch in sampler.sample(prompts, config):
        for samples in batch:
            prompt = PROMPTS[int(samples.prompt_id)]
            row = torch.tensor([prompt])
            out = model.generate(
                input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=NEW,
                do_sample=False,
            )  # fmt: skip
            own = out[0, len(prompt) :].tolist()
            found = samples.completion_ids  # of one prompt, so greedy ones are equal
            same &= all(x == own for x in found) or found[0] == recomputed(model, prompt)
    return sampler.route, same


def recomputed(model: Any, prompt: list[int]) -> list[int]:
    """Greedy tokens without any cache."""
    row = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits
        row.append(int(logits[0, -1].argmax()))
    return row[len(prompt) :]


class _NoText:
    eos_token_id = None

    def decode(self, *_: object, **__: object) -> str:
        return ""


def reason(error: BaseException) -> str:
    """Its type and the first line of what it says."""
    line = (str(error).strip().splitlines() or [""])[0][:90]
    return f"{type(error).__name__}: {line}"
