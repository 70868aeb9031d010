"""Samples of p^alpha by sequential Monte Carlo: N particles of a prompt, weighted and resampled.

Particles of a prompt grow a token at a time, from p^(1 / temperature) of the next token, and are
resampled where their weights run apart; at the end samples are drawn by weight. Proposal, ramp and
weights are those of Power-SMC (arXiv:2602.10273). The proposal has no nucleus: what it leaves out
no weight brings back.

Before token t the power is alpha_t. A particle of tokens y_1 ... y_t, drawn from the proposals q,
has the weight p(y_1 ... y_t)^alpha_t / q(y_1 ... y_t), so with token t it grows by

    (alpha_t - alpha_{t-1}) log p(y_1 ... y_{t-1}) + alpha_t log p(y_t | ...) - log q(y_t | ...)

where an ended particle has no more tokens and the first term alone. Resampling replaces all weights
of a prompt by their mean, whose logs sum to that of an unbiased estimate of Z.

`ParticleFilter`, `ParticleSampler`, `ParticleSamples`   what a user names
`ParticleStep`                                           one token of every particle
`effective_size`, `log_mean`, `systematic`               weights, and draws by them

G prompts, N particles of each, B = G N slots of particles, A of them active, C that stay so,
n samples of each prompt, P prompt tokens, T most new tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharpen.errors import InputError, check_fields
from sharpen.scoring.model_access import evaluating

from .base import Prompt, Samples, SamplingConfig, Share, plan_batches
from .decode import decode, decode_without_cache
from .draw import child_keys, row_key, uniform
from .power import PowerSampler, TemperedStep


@dataclass(frozen=True)
class ParticleFilter:
    """How particles are led to p^alpha.

    Attributes:
        alpha: Power of the target, at least 1 and finite: 1 + 1 / beta of KL-regularised
            self-reward.
        particles: N of each prompt; their distribution tends to the target as they grow.
        every: Tokens between two looks at the weights.
        threshold: Resample a prompt where the effective size of its particles is below this share
            of N; 0 never does.
        ramp: Tokens over which the power grows from 1 to alpha; 0 for alpha from the first token.
        proposal_temperature: At which tokens are drawn; None for 1 / alpha, where without a ramp
            the weights vary least among proposals that see no further than the next token. While
            the power grows that would be 1 / alpha_t; the weights allow for the difference.

    Raises:
        InputError: If a value is out of its range.
    """

    alpha: float = 4.0
    particles: int = 64
    every: int = 16
    threshold: float = 0.5
    ramp: int = 0
    proposal_temperature: float | None = None

    def __post_init__(self) -> None:
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
        check_fields(self, rules)

    @property
    def temperature(self) -> float:
        """Of the proposal."""
        given = self.proposal_temperature
        return 1 / self.alpha if given is None else given

    def alpha_after(self, n_tokens: int) -> float:
        """The power that weights stand at after this many tokens."""
        share = min(1.0, n_tokens / self.ramp) if self.ramp else 1.0
        return 1 + (self.alpha - 1) * share


@dataclass(frozen=True)
class ParticleSamples(Samples):
    """Particles, drawn by weight: one of weight W floor(n W) or ceil(n W) times, in random order.

    Attributes:
        particles: The number, of N, of each sample's particle.
        log_z: Estimate of log Z = log sum_y p(y | x)^alpha, nats; that of Z is unbiased.
        effective_size: Of the particles at the end, between 1 and N; 0 where all are NaN.
        n_resampled: How often they were resampled.
    """

    particles: list[int]
    log_z: float
    effective_size: float
    n_resampled: int


class ParticleSampler(PowerSampler[ParticleFilter]):
    """The `Sampler` of p^alpha by sequential Monte Carlo; `n` of the N particles of each prompt.

    Samples of a prompt come from one set of particles, which share beginnings: for samples that do
    not depend on each other, run it at several seeds. Noise depends on the prompt's id, the number
    of the particle and the seed alone; what rounding decides where particles are resampled is not
    settled, so another batch may now and then copy another particle.

    Args:
        model: As for `TransformersSampler`.
        tokenizer: As for `TransformersSampler`.
        power: How to lead the particles.
        max_tokens: As for `TransformersSampler`; all particles of a prompt must fit.
        sharing: As for `PowerSampler`.
    """

    def check(self, prompts: Sequence[Prompt], config: SamplingConfig) -> None:
        """See `PowerSampler`.

        Raises:
            InputError: Also if the particles of one prompt do not fit in `max_tokens`.
        """
        super().check(prompts, config)
        for prompt in prompts:
            need = sum(self._cost(prompt, config))
            if need > self.max_tokens:
                raise InputError(
                    f"{prompt.place}: `max_tokens` must hold {self.power.particles} particles of "
                    f"{config.max_new_tokens} tokens and their prompt of {len(prompt.ids)}, "
                    f"{need} in all, got {self.max_tokens}; raise it or lower `particles`."
                )

    def _cost(self, prompt: Prompt, config: SamplingConfig) -> tuple[int, int]:
        """Tokens held for the prompt and for its particles."""
        copies = 1 if self.route == "shared" else self.power.particles
        return copies * len(prompt.ids), self.power.particles * config.max_new_tokens

    def _plan(self, prompts: Sequence[Prompt], config: SamplingConfig) -> list[list[Share]]:
        """Which prompts run together, all particles of each."""
        costs = [self._cost(prompt, config) for prompt in prompts]
        lengths, own = [once for once, _ in costs], self.power.particles * config.max_new_tokens
        batches = plan_batches(lengths, 1, own, self.max_tokens, shared=True)
        return [[Share(share.prompt, 0, config.n) for share in batch] for batch in batches]

    def _run(
        self, prompts: Sequence[Prompt], batch: list[Share], config: SamplingConfig
    ) -> list[Samples]:
        N, device = self.power.particles, self.model.device
        led = [prompts[share.prompt] for share in batch]
        prompts_GP = torch.tensor([prompt.ids for prompt in led], device=device)
        keys = [row_key(config.seed, prompt.id, i) for prompt in led for i in range(N)]
        step = ParticleStep(
            self.model,
            prompts_GP.repeat_interleave(N, dim=0),
            torch.tensor(keys, device=device),
            self.eos_ids,
            dataclasses.replace(config, temperature=self.power.temperature),
            self.power,
        )
        shared = self._reads_once(prompts_GP.shape[1], config.max_new_tokens)
        with torch.no_grad(), evaluating(self.model):
            run = decode if shared else decode_without_cache
            run(self.model, prompts_GP, [N] * len(led), step)
        step.finish()
        return self._drawn(led, step, config.n)

    def _drawn(self, prompts: list[Prompt], step: "ParticleStep", n: int) -> list[Samples]:
        """Of each prompt `n` particles, drawn by weight."""
        keys_G, N = step.prompt_keys, self.power.particles
        chosen_Gn = systematic(step.log_weight, uniform(child_keys(keys_G, "choose")), n)
        keys_Gn = keys_G[:, None] + torch.arange(n, device=keys_G.device)
        order_Gn = uniform(child_keys(keys_Gn.flatten(), "order")).view_as(keys_Gn).argsort(dim=1)
        particles_Gn = chosen_Gn.gather(1, order_Gn).tolist()
        slots = [g * N + i for g, particles in enumerate(particles_Gn) for i in particles]
        ids, logprobs, reasons = step.results()
        rows = [ids[b] for b in slots], [logprobs[b] for b in slots], [reasons[b] for b in slots]
        return [
            ParticleSamples(
                **vars(samples),
                particles=particles,
                log_z=z,
                effective_size=size,
                n_resampled=times,
            )
            for samples, particles, z, size, times in zip(
                self._samples(prompts, [n] * len(prompts), rows),
                particles_Gn,
                step.log_z_G.tolist(),
                effective_size(step.log_weight).tolist(),
                step.n_resampled_G.tolist(),
                strict=True,
            )
        ]


# what a slot takes over from the slot that it copies
COPIED = ("token_BT", "logprob_BT", "proposal_BT", "count_B", "is_open", "is_nan", "total_B")


class ParticleStep(TemperedStep):
    """What `decode` calls at every token of the particles of a batch.

    Args:
        model: As for `DrawStep`.
        prompts: Of each slot, the slots of a prompt side by side.
        keys: Of each slot, N for each prompt.
        eos_ids: As for `DrawStep`.
        config: Its temperature is the proposal's.
        power: The target and when to resample.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Int64[Tensor, "B P"],
        keys: Int64[Tensor, " B"],
        eos_ids: tuple[int, ...],
        config: SamplingConfig,
        power: ParticleFilter,
    ):
        super().__init__(model, prompts, keys, eos_ids, config, config.temperature)
        self.power, self.prompt_keys = power, keys[:: power.particles]
        self.alpha = power.alpha_after(0)
        # slots that are active, in the order of the rows of the cache
        self.slots = torch.arange(len(keys), device=keys.device)
        self.total_B = torch.zeros(len(keys), dtype=torch.float64, device=keys.device)
        self.log_weight_B = torch.zeros_like(self.total_B)
        self.log_z_G = self.total_B.new_zeros(len(self.prompt_keys))
        self.n_resampled_G = torch.zeros_like(self.prompt_keys)

    @property
    def log_weight(self) -> Float64[Tensor, "G N"]:
        """Since the last resampling."""
        return self.log_weight_B.view(len(self.prompt_keys), -1)

    def __call__(
        self, rows: Int64[Tensor, " A"], scores: Float[Tensor, "A V"]
    ) -> tuple[Int64[Tensor, " A"], Int64[Tensor, " C"]]:
        """The token of each active particle, and the active row that each next row continues."""
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
        """Raise all weights to the target, once no particle is active."""
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
        for name in COPIED:
            setattr(self, name, getattr(self, name)[ancestor_B])
        return ancestor_B


def effective_size(log_weight: Float64[Tensor, "G N"]) -> Float64[Tensor, " G"]:
    """(sum w)^2 / sum w^2: N for equal weights, 1 where one weighs all, 0 where none weighs.

    Source: Kong, Liu & Wong 1994.

    Example:
        >>> effective_size(torch.tensor([[0.0, 0.0, -math.inf, 0.0]]).double())
        tensor([3.], dtype=torch.float64)
    """
    return (1 / log_weight.softmax(dim=1).square().sum(dim=1)).nan_to_num(nan=0.0)


def log_mean(log_weight: Float64[Tensor, "G N"]) -> Float64[Tensor, " G"]:
    """The log of the mean weight; -inf where none weighs."""
    return log_weight.logsumexp(dim=1) - math.log(log_weight.shape[1])


def systematic(
    log_weight: Float64[Tensor, "G N"], uniform: Float64[Tensor, " G"], n: int
) -> Int64[Tensor, "G n"]:
    """Draw n particles of each group: one of weight share W comes floor(n W) or ceil(n W) times.

    In their order. The mean over the uniform number is n W. Where no particle weighs anything, all
    weigh the same.

    Args:
        log_weight: -inf for a particle that must not be drawn.
        uniform: In (0, 1), one a group.
        n: Draws of each group.

    Source: Carpenter, Clifford & Fearnhead 1999.

    Example:
        >>> weight = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).double()
        >>> systematic(weight.log(), torch.tensor([0.5]).double(), 4)
        tensor([[0, 0, 2, 3]])
    """
    share_GN = log_weight.softmax(dim=1).nan_to_num(nan=1 / log_weight.shape[1])
    below_GN = share_GN.cumsum(dim=1)
    # the last sum is 1 to the bit, so that a point below 1 has a particle of some weight
    below_GN = below_GN / below_GN[:, -1:]
    place_n = torch.arange(n, device=log_weight.device)
    # a sum of a half and a uniform number could round to n
    point_Gn = ((place_n + uniform[:, None]) / n).clamp_(max=1 - 2.0**-53)
    return torch.searchsorted(below_GN, point_Gn, right=True)
