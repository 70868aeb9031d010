"""What the samplers of the power distribution share: its target, its checks, its drawing step.

    p_alpha(y | x) = p(y | x)^alpha / Z(x),      Z(x) = sum_y p(y | x)^alpha

over the sequences y that a model can be made to write: those that end with an end token, and those
of `max_new_tokens` tokens that do not, cut there. It is the distribution that maximises

    E[log p(y | x)] - beta KL(. || p),      alpha = 1 + 1 / beta

(Huang et al. 2024, arXiv:2412.01951, Eq. 3). Lowering the temperature gives another distribution:
it raises each token's probability to alpha and forgets what may follow the token.

Both samplers draw tokens from a proposal q ~ p^(1 / temperature) of the next token and correct for
it: `metropolis.py` by accepting or rejecting, `smc.py` by weights.

B rows, A of them that are active, P prompt tokens, T most new tokens, V vocabulary.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError

from .base import Prompt, SamplingConfig
from .decode import Decoding
from .hf import DrawStep, TransformersSampler

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings")


class PowerSampler(TransformersSampler, Generic[Settings]):
    """A `TransformersSampler` whose target, not the caller, sets the temperature.

    Args:
        model: As for `TransformersSampler`.
        tokenizer: As for `TransformersSampler`.
        power: The target, and how to reach it.
        max_tokens: As for `TransformersSampler`.
        sharing: As for `TransformersSampler`; where nothing is shared, whole sequences are read
            again at every token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        power: Settings,
        *,
        max_tokens: int = 65536,
        sharing: str = "auto",
    ):
        super().__init__(model, tokenizer, max_tokens=max_tokens, sharing=sharing)
        self.power = power

    def check(self, prompts: Sequence[Prompt], config: SamplingConfig) -> None:
        """See `TransformersSampler`.

        Raises:
            InputError: Also if `config` asks for a temperature or a nucleus.
        """
        for name in ("temperature", "top_p"):
            if (value := getattr(config, name)) != 1:
                raise InputError(
                    f"`{name}` must be 1 for a sampler of the power distribution, got {value}; "
                    "`alpha` says how sharp it is."
                )
        super().check(prompts, config)

    @functools.cached_property
    def route(self) -> Decoding:
        """See `TransformersSampler`; "generate" here means decoding without a cache."""
        way = super().route
        if way != "shared":
            logger.info(
                "%s samples its power distribution without a cache: whole sequences are read "
                "again at every token.",
                type(self.model).__name__,
            )
        return way


class TemperedStep(DrawStep):
    """A `DrawStep` that also remembers each token's log-prob under the proposal.

    Args:
        model: As for `DrawStep`.
        prompts: As for `DrawStep`.
        keys: As for `DrawStep`.
        eos_ids: As for `DrawStep`.
        config: As for `DrawStep`; its temperature need not be the proposal's.
        proposal_temperature: Above 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Int64[Tensor, "B P"],
        keys: Int64[Tensor, " B"],
        eos_ids: tuple[int, ...],
        config: SamplingConfig,
        proposal_temperature: float,
    ):
        super().__init__(model, prompts, keys, eos_ids, config)
        self.proposal_temperature = proposal_temperature
        self.proposal_BT = torch.zeros_like(self.logprob_BT)

    def _draw(
        self, rows: Int64[Tensor, " A"], is_open: Bool[Tensor, " A"], logits: Float32[Tensor, "A V"]
    ) -> Int64[Tensor, " A"]:
        token_A = super()._draw(rows, is_open, logits)
        tempered_AV = logits / self.proposal_temperature
        chosen_A = tempered_AV.gather(1, token_A[:, None]).squeeze(1)
        self.proposal_BT[rows, self.step] = chosen_A - tempered_AV.logsumexp(dim=1)
        return token_A
