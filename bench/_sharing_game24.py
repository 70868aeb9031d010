"""Best-of-50 on the model that ships: its prompts after six worked examples, sampled and scored.

As `sharpen bon --model game24 --task game24 --split sharpen --shots 6 -n 50` runs them, against the
first version's ways: `generate` on N copies of each prompt, and padded batches of whole sequences.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sharpen import Scorer
from sharpen.commands.inputs import open_source
from sharpen.commands.options import PromptOptions
from sharpen.models import load_model, load_tokenizer
from sharpen.sampling import SamplingConfig
from sharpen.sampling.base import render_all
from sharpen.sampling.hf import TransformersSampler

MAX_TOKENS = 32768  # of a batch, as `bon` has it
SAMPLERS = {"ours, shared": "shared", "generate": "none"}
SCORERS = {"ours, auto": "auto", "whole sequences": "none"}


@dataclasses.dataclass
class Puzzles:
    """Some prompts, how to draw, and the token ids that each contender drew last."""

    n_prompts: int
    max_new_tokens: int
    n: int
    drawn: dict[str, list[list[list[int]]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the prompts."""
        self.config = SamplingConfig(n=self.n, max_new_tokens=self.max_new_tokens)
        self.tokenizer = load_tokenizer("game24")
        options = PromptOptions(task="game24", split="sharpen", shots=6, limit=self.n_prompts)
        self.prompts = render_all(open_source(options, self.tokenizer).records, self.tokenizer)

    @property
    def flops(self) -> float:
        """Of every prompt token once and every token drawn, in the layers and the head."""
        n = sum(p.numel() for p in load_model("game24").parameters())
        groups = next(iter(self.drawn.values()), [])
        n_drawn = sum(len(ids) for group in groups for ids in group)
        return 2.0 * n * (sum(len(prompt.ids) for prompt in self.prompts) + n_drawn)

    def sampling(self) -> dict[str, Callable[[], Tensor]]:
        """Draw all samples; their log-probs, end to end."""
        return {name: self._sampler(name, way) for name, way in SAMPLERS.items()}

    def _sampler(self, name: str, sharing: str) -> Callable[[], Tensor]:
        model = load_model("game24")
        sampler = TransformersSampler(model, self.tokenizer, max_tokens=MAX_TOKENS, sharing=sharing)
        assert sampler.route == ("shared" if sharing == "shared" else "generate")

        def call() -> Tensor:
            found = {s.prompt_id: s for b in sampler.sample(self.prompts, self.config) for s in b}
            every = [found[prompt.id] for prompt in self.prompts]
            self.drawn[name] = [samples.completion_ids for samples in every]
            return torch.tensor([x for s in every for row in s.logprobs for x in row])

        return call

    def scoring(self) -> dict[str, Callable[[], Tensor]]:
        """Score the samples that ours draws; their log-probs, end to end."""
        self._sampler("ours, shared", "shared")()
        (completions,) = self.drawn.values()
        prompts = [list(prompt.ids) for prompt in self.prompts]
        return {name: _scorer(way, prompts, completions) for name, way in SCORERS.items()}

    def check_draws(self) -> None:
        """Raise unless every contender drew the same token ids."""
        first, *others = self.drawn.values()
        if any(other != first for other in others):
            raise RuntimeError("the contenders drew different tokens")


def _scorer(sharing: str, prompts: list[list[int]], completions: Any) -> Callable[[], Tensor]:
    scorer = Scorer(load_model("game24"), sharing=sharing, max_tokens=MAX_TOKENS)
    assert (scorer.route.sharing == "none") == (sharing == "none")

    def call() -> Tensor:
        found = scorer.score(prompts, completions).tokens.logprob
        assert found is not None
        return found

    return call
