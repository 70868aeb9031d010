"""Samples of p^alpha by sequential Monte Carlo: N particles a prompt, weighted, resampled, drawn.

Particles of a prompt grow a token at a time, from p^(1 / temperature) of the next token, and are
resampled where their weights run apart (`particles.py`); at the end samples are drawn by weight.
Proposal, ramp and weights are those of Power-SMC (arXiv:2602.10273). The proposal has no nucleus:
what it leaves out no weight brings back.

B slots of particles, G prompts, N particles of each, n samples of each.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError
from sharpen.scoring.forward import evaluating

from .draw import child_keys, row_key, uniform
from .hf import Rows
from .particles import ParticleFilter as ParticleFilter
from .particles import ParticleStep
from .plan import plan_batches
from .power import PowerSampler
from .protocol import Prompt, Samples, SamplingConfig
from .resampling import effective_size, systematic


@dataclass(frozen=True)
class ParticleSamples(Samples):
    """Particles, drawn by weight; one of weight W floor(n W) or ceil(n W) times, in random order.

    Attributes:
        particles: Which of the N each sample is.
        log_z: Estimate of log Z = log sum_y p(y | x)^alpha, nats; that of Z is unbiased.
        effective_size: Of the particles at the end, between 1 and N; 0 where all are NaN.
        n_resampled: How often they were resampled.
    """

    particles: list[int]
    log_z: float
    effective_size: float
    n_resampled: int


class ParticleSampler(PowerSampler):
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
        sharing: As for `TransformersSampler`; where nothing is shared, whole sequences are read
            again at every token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        power: ParticleFilter,
        *,
        max_tokens: int = 65536,
        sharing: str = "auto",
    ):
        super().__init__(model, tokenizer, max_tokens=max_tokens, sharing=sharing)
        self.power = power

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

    def sample(
        self, prompts: Sequence[Prompt], config: SamplingConfig, *, done: Collection[str] = ()
    ) -> Iterator[list[Samples]]:
        """See `Sampler`. A batch in which any prompt is unfinished is run whole.

        Raises:
            InputError: As `check` does.
        """
        self.check(prompts, config)
        costs = [self._cost(prompt, config) for prompt in prompts]
        lengths, own = [once for once, _ in costs], self.power.particles * config.max_new_tokens
        for batch in plan_batches(lengths, 1, own, self.max_tokens, shared=True):
            chosen = [prompts[share.prompt] for share in batch]
            if all(prompt.id in done for prompt in chosen):
                continue
            found = self._led(chosen, config)
            yield [samples for samples in found if samples.prompt_id not in done]

    def _cost(self, prompt: Prompt, config: SamplingConfig) -> tuple[int, int]:
        """Tokens held for the prompt and for its particles."""
        copies = 1 if self.route == "shared" else self.power.particles
        return copies * len(prompt.ids), self.power.particles * config.max_new_tokens

    def _led(self, prompts: list[Prompt], config: SamplingConfig) -> list[ParticleSamples]:
        """The samples of prompts of one length."""
        N, device = self.power.particles, self.model.device
        prompts_GP = torch.tensor([prompt.ids for prompt in prompts], device=device)
        keys = [row_key(config.seed, prompt.id, i) for prompt in prompts for i in range(N)]
        keys_B = torch.tensor(keys, device=device)
        tempered = dataclasses.replace(config, temperature=self.power.temperature)
        with torch.no_grad(), evaluating(self.model):
            step = ParticleStep(
                self.model,
                prompts_GP.repeat_interleave(N, dim=0),
                keys_B,
                self.eos_ids,
                tempered,
                self.power,
                prompt_keys=keys_B[::N],
            )
            self.opened(prompts_GP, config.max_new_tokens)([N] * len(prompts), step)
        step.finish()
        return self._drawn(prompts, step, config.n)

    def _drawn(self, prompts: list[Prompt], step: ParticleStep, n: int) -> list[ParticleSamples]:
        keys_G, N = step.prompt_keys, self.power.particles
        chosen_Gn = systematic(step.log_weight, uniform(child_keys(keys_G, "choose")), n)
        keys_Gn = keys_G[:, None] + torch.arange(n, device=keys_G.device)
        order_Gn = uniform(child_keys(keys_Gn.flatten(), "order")).view_as(keys_Gn).argsort(dim=1)
        chosen = chosen_Gn.gather(1, order_Gn).tolist()
        sizes = effective_size(step.log_weight).tolist()
        log_z, resampled = step.log_z_G.tolist(), step.n_resampled_G.tolist()
        ids, logprobs, reasons = step.results()
        found = []
        for g, particles in enumerate(chosen):
            at = [g * N + i for i in particles]
            rows = Rows([g] * n, *([values[b] for b in at] for values in (ids, logprobs, reasons)))
            (samples,) = self._collect(prompts, [rows], n)
            found.append(
                ParticleSamples(
                    **vars(samples),
                    particles=particles,
                    log_z=log_z[g],
                    effective_size=sizes[g],
                    n_resampled=resampled[g],
                )
            )
        return found
