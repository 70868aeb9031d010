"""One token of every particle: draw it, weigh it, and now and then copy the heavy over the light.

Before token t the power is alpha_t. A particle of tokens y_1 ... y_t, drawn from the proposals q,
has the weight p(y_1 ... y_t)^alpha_t / q(y_1 ... y_t), so with token t it grows by

    (alpha_t - alpha_{t-1}) log p(y_1 ... y_{t-1}) + alpha_t log p(y_t | ...) - log q(y_t | ...)

where an ended particle has no more tokens and the first term alone. Resampling replaces all weights
of a prompt by their mean, whose logs sum to that of an unbiased estimate of Z.

B = G N slots of particles, A of them open, C that go on, G prompts of P tokens, T most new tokens.
"""

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from .draw import child_keys, uniform
from .power import check_settings
from .protocol import SamplingConfig
from .resampling import effective_size, log_mean, systematic
from .tempered_step import TemperedStep


@dataclass(frozen=True)
class ParticleFilter:
    """How particles are led to p^alpha.

    Attributes:
        alpha: Power of the target, at least 1 and finite: 1 + 1 / beta of KL-regularised
            self-reward.
        particles: N of each prompt; their law tends to the target as they grow.
        every: Tokens between two looks at the weights.
        threshold: Resample a prompt where the effective size of its particles is below this share
            of N; 0 never does.
        ramp: Tokens over which the power grows from 1 to alpha; 0 for alpha from the first token.
        proposal_temperature: At which tokens are drawn; None for 1 / alpha, where without a ramp
            the weights vary least among proposals that see no further than the next token. While
            the power grows that would be 1 / alpha_t; the weights allow for the difference.
    """

    alpha: float = 4.0
    particles: int = 64
    every: int = 16
    threshold: float = 0.5
    ramp: int = 0
    proposal_temperature: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be led.

        Raises:
            InputError: If a value is out of its range.
        """
        tau = self.proposal_temperature
        rules = [
            ("alpha", 1 <= self.alpha < math.inf, "at least 1 and finite"),
            ("particles", self.particles >= 1, "at least 1"),
            ("every", self.every >= 1, "at least 1"),
            ("threshold", 0 <= self.threshold <= 1, "in [0, 1]"),
            ("ramp", self.ramp >= 0, "at least 0"),
            ("proposal_temperature", tau is None or 0 < tau < math.inf, "above 0 and finite"),
        ]
        rules += [
            (name, isinstance(getattr(self, name), Integral), "a whole number")
            for name in ("particles", "every", "ramp")
        ]
        check_settings(self, rules)

    @property
    def temperature(self) -> float:
        """Of the proposal."""
        given = self.proposal_temperature
        return 1 / self.alpha if given is None else given

    def alpha_after(self, n_tokens: int) -> float:
        """The power that weights stand at after this many tokens."""
        share = min(1.0, n_tokens / self.ramp) if self.ramp else 1.0
        return 1 + (self.alpha - 1) * share


class ParticleStep(TemperedStep):
    """What `decode` calls at every token of the particles of a batch.

    Args:
        model: As for `DrawStep`.
        prompts: Of each slot, the slots of a prompt side by side.
        keys: One a slot.
        eos_ids: As for `DrawStep`.
        config: Its temperature is the proposal's.
        power: The target and when to resample.
        prompt_keys: One a prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Int64[Tensor, "B P"],
        keys: Int64[Tensor, " B"],
        eos_ids: tuple[int, ...],
        config: SamplingConfig,
        power: ParticleFilter,
        prompt_keys: Int64[Tensor, " G"],
    ):
        super().__init__(model, prompts, keys, eos_ids, config, config.temperature)
        self.power, self.prompt_keys = power, prompt_keys
        self.alpha = power.alpha_after(0)
        # slots that are open, in the order of the rows of the cache
        self.slots = torch.arange(len(keys), device=keys.device)
        self.total_B = torch.zeros(len(keys), dtype=torch.float64, device=keys.device)
        self.log_weight_B = torch.zeros_like(self.total_B)
        self.log_z_G = self.total_B.new_zeros(len(prompt_keys))
        self.n_resampled_G = torch.zeros_like(prompt_keys)

    @property
    def log_weight(self) -> Float64[Tensor, "G N"]:
        """Since the last resampling."""
        return self.log_weight_B.view(len(self.prompt_keys), -1)

    def __call__(
        self, rows: Int64[Tensor, " A"], scores: Float[Tensor, "A V"]
    ) -> tuple[Int64[Tensor, " A"], Int64[Tensor, " C"]]:
        """The token of each open particle, and the open row that each next row continues."""
        before, t = self.slots, self.step
        token_A, _ = super().__call__(before, scores)
        self._raise_to(self.power.alpha_after(self.step))
        logprob_A = self.logprob_BT[before, t].double()
        gain_A = self.alpha * logprob_A - self.proposal_BT[before, t].double()
        is_nan_A = self.is_nan[before]
        self.log_weight_B[before] += gain_A.masked_fill(is_nan_A, float("-inf"))
        self.total_B[before] += logprob_A.masked_fill(is_nan_A, 0.0)
        is_last = self.step == self.config.max_new_tokens
        source_B = torch.zeros_like(self.count_B)
        source_B[before] = torch.arange(len(before), device=before.device)
        if self.step % self.power.every == 0 and not is_last:
            ancestor_B = self._resampled()
            source_B = source_B[ancestor_B]
        self.slots = self.is_open.nonzero().flatten()
        if is_last:
            return token_A, self.slots[:0]
        return token_A, source_B[self.slots]

    def finish(self) -> None:
        """Raise all weights to the target, once no particle is open."""
        self._raise_to(self.power.alpha)
        self.log_z_G += log_mean(self.log_weight)

    def _raise_to(self, alpha: float) -> None:
        self.log_weight_B += (alpha - self.alpha) * self.total_B
        self.alpha = alpha

    def _resampled(self) -> Int64[Tensor, " B"]:
        """Resample the prompts whose weights have run apart; the slot that each slot now copies."""
        G, N = self.log_weight.shape
        is_due_G = effective_size(self.log_weight) < self.power.threshold * N
        is_due_G &= self.is_open.view(G, N).any(dim=1)
        u_G = uniform(child_keys(self.prompt_keys, f"resample {self.step}"))
        own_GN = torch.arange(N, device=u_G.device).expand(G, N)
        chosen_GN = torch.where(is_due_G[:, None], systematic(self.log_weight, u_G, N), own_GN)
        first_G = torch.arange(0, G * N, N, device=u_G.device)
        ancestor_B = (chosen_GN + first_G[:, None]).flatten()
        self.log_z_G += log_mean(self.log_weight).where(is_due_G, 0.0)
        self.n_resampled_G += is_due_G
        self.log_weight_B = self.log_weight.masked_fill(is_due_G[:, None], 0.0).flatten()
        for name in (
            "token_BT", "logprob_BT", "proposal_BT", "count_B", "is_open", "is_nan", "total_B",
        ):  # fmt: skip
            setattr(self, name, getattr(self, name)[ancestor_B])
        return ancestor_B
