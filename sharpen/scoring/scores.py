"""Scores: the statistics of every completion token, and how they are laid out.

S scored tokens, N completions of all prompts together, P prompts.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen_kernels import TokenStats

from .rewards import compute

logger = logging.getLogger(__name__)

N_NAMED = 5  # completions that one warning names


@dataclass(frozen=True, eq=False)
class Scores:
    """Scored completions of P prompts, in input order, on the CPU.

    Attributes:
        tokens: Statistics of the S scored tokens, all completions end to end; None for those
            that were not asked for.
        offsets: Completion n owns the tokens offsets[n] ... offsets[n + 1] - 1; length N + 1.
        groups: Prompt p owns the completions groups[p] ... groups[p + 1] - 1; length P + 1.
        valid: False for a completion that must not be chosen, such as one cut at the token limit.
    """

    tokens: TokenStats
    offsets: Int64[Tensor, " token_bounds"]
    groups: Int64[Tensor, " completion_bounds"]
    valid: Bool[Tensor, " N"]

    @classmethod
    def of(
        cls,
        tokens: TokenStats,
        lengths: Sequence[Sequence[int]],
        valid: Sequence[Sequence[bool]] | None = None,
    ) -> "Scores":
        """Scores from token statistics and the length of each completion of each prompt.

        Raises:
            InputError: If `valid` is given and does not have one entry per completion.
        """
        if valid is None:
            valid = [[True] * len(group) for group in lengths]
        wanted, got = [len(group) for group in lengths], [len(group) for group in valid]
        if wanted != got:
            raise InputError(
                f"`valid` must hold one entry per completion, {_shortened(wanted)} for the "
                f"prompts, got {_shortened(got)}."
            )
        flat = [length for group in lengths for length in group]
        return cls(
            tokens,
            offsets=torch.tensor([0, *accumulate(flat)]),
            groups=torch.tensor([0, *accumulate(wanted)]),
            valid=torch.tensor([bool(x) for group in valid for x in group], dtype=torch.bool),
        )

    @classmethod
    def from_logprobs(
        cls,
        logprobs: Sequence[Sequence[Sequence[float]]],
        valid: Sequence[Sequence[bool]] | None = None,
    ) -> "Scores":
        """Scores without a forward, from the log-probs that a sampler kept.

        Args:
            logprobs: Raw (temperature 1) log-prob in nats of each token of each completion of each
                prompt.
            valid: As in `Scorer.score`.

        Raises:
            InputError: If `valid` is given and does not have one entry per completion.

        Example:
            >>> scores = Scores.from_logprobs([[[-1.0, -2.0], [-0.5]]])
            >>> scores.reward("logprob")
            tensor([-3.0000, -0.5000])
        """
        flat = [x for group in logprobs for completion in group for x in completion]
        lengths = [[len(completion) for completion in group] for group in logprobs]
        return cls.of(TokenStats(logprob=torch.tensor(flat, dtype=torch.float32)), lengths, valid)

    # an option is whatever its reward says it is
    def reward(self, name: str, **options: Any) -> Float32[Tensor, " N"]:
        """One reward per completion; higher is better. See `rewards.REWARDS` for the names.

        Args:
            name: "logprob", "mean_logprob", "self_certainty", "confidence_tail", "majority", ...
            **options: What the reward asks for: `answers` for "majority", and `keys` too for "rpc";
                `window` for those of windows, if not a tenth of the completion.

        Raises:
            InputError: If there is no such reward, its statistic was not computed, or its options
                are missing or unknown.
        """
        layout = {"offsets": self.offsets, "groups": self.groups, "valid": self.valid}
        return compute(name, vars(self.tokens) | layout, options)

    # as `reward`
    def by_prompt(self, name: str, **options: Any) -> list[Float32[Tensor, " G"]]:
        """`reward`, one tensor per prompt, its completions in input order."""
        sizes = self.groups.diff().tolist()
        return list(self.reward(name, **options).split(sizes))

    @property
    def eligible(self) -> Bool[Tensor, " N"]:
        """Which completions may be chosen: valid, not empty, no NaN in their log-probs."""
        return self.valid & (self.offsets.diff() > 0) & ~self.reward("logprob").isnan()

    def nan_completions(self) -> list[tuple[int, int]]:
        """(prompt, completion) of each completion with a NaN log-prob, in input order."""
        return [
            (p, g)
            for p, reward_G in enumerate(self.by_prompt("logprob"))
            for g in reward_G.isnan().nonzero().flatten().tolist()
        ]

    def warn_of_nan(self) -> None:
        """Name the completions whose log-prob is NaN, in one warning."""
        broken = self.nan_completions()
        if broken:
            more = f" and {len(broken) - N_NAMED} more" if len(broken) > N_NAMED else ""
            logger.warning(
                "log-prob is NaN in %s%s: never chosen; look for NaN in the weights, or overflow "
                "in half precision.",
                ", ".join(f"completions[{p}][{g}]" for p, g in broken[:N_NAMED]),
                more,
            )


def _shortened(counts: list[int]) -> str:
    shown = ", ".join(map(str, counts[:8]))
    return f"[{shown}{', ...' if len(counts) > 8 else ''}]"
