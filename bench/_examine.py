"""One model type of `bench/support.py`: is it scored and sampled as the model itself says?"""

import dataclasses
from typing import Any

import tokenizers
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from bench._own_words import COMPLETIONS, NEW, PROMPTS, alone, padded, recomputed, wide
from bench._tiny_models import tiny_model
from bench._tiny_sizes import V
from sharpen import Scorer
from sharpen.errors import SharpenError
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.hf import TransformersSampler

FLOOR_NATS = 2e-5
NOISE_FACTOR = 8  # of what fp32 costs the model itself
WRONG_NATS = 1e-3  # more is no rounding


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
    for way in (padded, lambda m: alone(wide(m))):
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
    words = tokenizers.models.WordLevel({str(i): i for i in range(V)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    sampler = TransformersSampler(model, tokenizer)
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


def reason(error: BaseException) -> str:
    """Its type and the first line of what it says."""
    line = (str(error).strip().splitlines() or [""])[0][:90]
    return f"{type(error).__name__}: {line}"
