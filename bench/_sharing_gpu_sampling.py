"""N samples of one prompt of a random model: ours, and `generate` on N copies of the prompt."""

from typing import Any

import torch
from torch import Tensor

from bench._sharing_gpu_ways import Calls, Setting
from sharpen.sampling import SamplingConfig
from sharpen.sampling.base import Prompt
from sharpen.sampling.hf import TransformersSampler

GENERATE = "generate"


class _Words:
    """What a sampler asks of a tokenizer."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: object) -> str:
        """Numbers, as words."""
        return " ".join(map(str, ids))


def sampling_calls(at: Setting, temperature: float) -> Calls:
    """Ids [N x C] that each draws."""
    N, C = at.problem.N, at.problem.C
    tokenizer: Any = _Words()
    sampler = TransformersSampler(at.ours, tokenizer, max_tokens=2**20, sharing="shared")
    prompts = [Prompt("0", "", tuple(at.prompt.tolist()), "bench")]
    config = SamplingConfig(n=N, max_new_tokens=C, temperature=temperature)

    def ours() -> Tensor:
        ((samples,),) = sampler.sample(prompts, config)
        return torch.tensor(samples.completion_ids).flatten()

    def generate() -> Tensor:
        ids = at.prompt.expand(N, -1)
        options = {"do_sample": True, "top_k": 0} if temperature else {"do_sample": False}
        mask = torch.ones_like(ids)
        found = at.plain.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=C, pad_token_id=0, **options
        )
        return found[:, len(at.prompt) :].flatten()

    return {"ours": ours, GENERATE: generate}
