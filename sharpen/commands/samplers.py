"""Which sampler a command draws with: the model's own law, or its power p^alpha in two ways."""

from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError
from sharpen.sampling.hf import TransformersSampler
from sharpen.sampling.metropolis import Metropolis, MetropolisSampler
from sharpen.sampling.smc import ParticleFilter, ParticleSampler

from .options import option

# settings that only a sampler of p^alpha has, and whose they are
OF = {
    "alpha": ("mh", "smc"),
    "steps": ("mh",),
    "particles": ("smc",),
    "ramp": ("smc",),
    "resample_every": ("smc",),
    "resample_threshold": ("smc",),
    "proposal_temperature": ("mh", "smc"),
}
# those that the sampler's own settings call otherwise
FIELDS = {"resample_every": "every", "resample_threshold": "threshold"}


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """How completions are drawn, if not from the model's own law."""

    sampler: Literal["model", "mh", "smc"] = option(
        "model: p(y|x); its power p(y|x)^alpha by mh: Metropolis-Hastings, smc: particles", "model"
    )
    alpha: float | None = option("mh, smc: the power, at least 1; default 4")
    steps: int | None = option("mh: moves of each chain; default 10")
    particles: int | None = option("smc: particles of each prompt; default 64")
    ramp: int | None = option("smc: tokens over which the power grows from 1; default 0")
    resample_every: int | None = option("smc: tokens between two looks at weights; default 16")
    resample_threshold: float | None = option(
        "smc: resample where the effective size is below this share of particles; default 0.5"
    )
    proposal_temperature: float | None = option(
        "mh, smc: temperature of the proposal; default 1/alpha"
    )

    def power(self) -> Metropolis | ParticleFilter | None:
        """The settings of the sampler; None for the model's own law.

        Raises:
            InputError: If one is out of its range, or belongs to another sampler.
        """
        given = self._given()
        for name in given:
            if self.sampler not in OF[name]:
                flag = name.replace("_", "-")
                raise InputError(
                    f"`--{flag}` must come with `--sampler` {' or '.join(OF[name])}, got "
                    f"{self.sampler}; leave one out."
                )
        if self.sampler == "model":
            return None
        kind = Metropolis if self.sampler == "mh" else ParticleFilter
        return kind(**{FIELDS.get(name, name): value for name, value in given.items()})

    def sampler_settings(self) -> dict[str, Any]:
        """What the samples depend on; nothing for the model's own law."""
        return {} if self.sampler == "model" else {"sampler": self.sampler, **self._given()}

    def _given(self) -> dict[str, Any]:
        return {name: value for name in OF if (value := getattr(self, name)) is not None}


def open_sampler(
    power: Metropolis | ParticleFilter | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
) -> TransformersSampler:
    """The sampler that has these settings."""
    if power is None:
        return TransformersSampler(model, tokenizer, max_tokens=max_tokens)
    if isinstance(power, Metropolis):
        return MetropolisSampler(model, tokenizer, power, max_tokens=max_tokens)
    return ParticleSampler(model, tokenizer, power, max_tokens=max_tokens)
