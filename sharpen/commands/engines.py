"""What draws the completions of a command: the model in transformers or vLLM, or an endpoint.

Which sampler a command draws with: the model's own law, or its power p^alpha in two ways.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError
from sharpen.models import load_tokenizer, resolve_model
from sharpen.sampling.endpoint import (
    EndpointClient,
    EndpointSampler,
    Patience,
    check_key,
    check_url,
)
from sharpen.sampling.hf import TransformersSampler
from sharpen.sampling.metropolis import Metropolis, MetropolisSampler
from sharpen.sampling.smc import ParticleFilter, ParticleSampler
from sharpen.sampling.vllm_engine import VllmEngine

from .inputs import load
from .options import ModelOptions, option

OPENAI_HOST, OPENAI_KEY = "api.openai.com", "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Which OpenAI-compatible completions endpoint, and how patient to be with it."""

    endpoint: str | None = option(
        "draw from an OpenAI-compatible completions endpoint, such as https://api.openai.com/v1"
    )
    endpoint_model: str = option("its name there", "")
    endpoint_prompts: Literal["text", "ids"] = option(
        "text: any server; ids: token ids both ways (vLLM), with the tokenizer of --model", "text"
    )
    endpoint_key_env: str | None = option(
        f"environment variable that holds its key; default: {OPENAI_KEY} for {OPENAI_HOST}, else "
        "no key"
    )
    endpoint_concurrency: int = option("requests to it at a time", 8)
    endpoint_rpm: float | None = option("most requests begun in a minute; default: no limit")
    endpoint_timeout: float = option("seconds for one answer", 600.0)
    endpoint_tries: int = option("times that a request is sent, waits growing between", 8)
    endpoint_choices: int = option("most completions asked for in one request", 128)

    def client(self) -> EndpointClient:
        """The endpoint, not yet called.

        Raises:
            InputError: If the URL or a number is bad, or the key is not there.
        """
        assert self.endpoint is not None
        patience = Patience(
            timeout_s=self.endpoint_timeout,
            tries=self.endpoint_tries,
            per_minute=self.endpoint_rpm,
        )
        return EndpointClient(self.endpoint, key=self.key(), patience=patience)

    def key(self) -> str | None:
        """The key, from the environment.

        Raises:
            InputError: If the variable that was named is not set, or its value cannot be sent.
        """
        assert self.endpoint is not None
        check_url(self.endpoint)
        name = self.endpoint_key_env
        if name is None and urlsplit(self.endpoint).hostname == OPENAI_HOST:
            name = OPENAI_KEY
        if name is None:
            return None
        key = os.environ.get(name)
        if not key:
            raise InputError(
                f"`endpoint` needs its key in the environment variable {name}, which is not set; "
                "export it, or name another one by `--endpoint-key-env`."
            )
        check_key(self.endpoint, key)
        return key


@dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """How vLLM is made."""

    vllm: list[str] = field(
        default_factory=list,
        metadata={"help": "vllm: further arguments of vllm.LLM, as NAME=VALUE"},
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions(VllmOptions, EndpointOptions):
    """What draws the completions."""

    engine: Literal["transformers", "vllm"] = option(
        "what runs --model: transformers; vllm (in an environment that has it)", "transformers"
    )

    def engine_settings(self) -> dict[str, Any]:
        """What the samples depend on; nothing for transformers."""
        if self.endpoint is not None:
            return {
                "endpoint": self.endpoint,
                "endpoint_model": self.endpoint_model,
                "endpoint_prompts": self.endpoint_prompts,
                "endpoint_choices": self.endpoint_choices,
            }
        return {"engine": "vllm", "vllm": self.vllm} if self.engine == "vllm" else {}


@dataclass(frozen=True)
class Opened:
    """A sampler that is ready.

    Attributes:
        sampler: Draws.
        tokenizer: Of `--model`; None for an endpoint without one.
        device: For the settings of the run.
        model: The weights, where transformers runs them.
    """

    sampler: TransformersSampler | VllmEngine | EndpointSampler
    tokenizer: PreTrainedTokenizerBase | None
    device: str
    model: PreTrainedModel | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(EngineOptions, ModelOptions):
    """The options that `opened` reads."""

    model: str = option(
        "game24 (ships with sharpen), a model folder, or a hub id; with --endpoint: whose "
        "tokenizer and chat template, if any",
        "",
    )


def check_engine(options: SamplingOptions) -> None:
    """Refuse contradictory options before anything is loaded.

    Raises:
        InputError: If so.
    """
    if options.endpoint is None:
        if not options.model:
            raise InputError("`model` must be given, or `--endpoint`, got neither.")
        if options.vllm and options.engine != "vllm":
            raise InputError("`--vllm` must come with `--engine vllm`; leave one out.")
        for name in ("endpoint_model", "endpoint_key_env"):
            if getattr(options, name):
                flag = name.replace("_", "-")
                raise InputError(f"`--{flag}` must come with `--endpoint`; leave one out.")
        llm_arguments(options.vllm)
        return
    if options.engine == "vllm" or options.vllm:
        raise InputError(
            "give one of `--endpoint` and `--engine vllm`, got both; the server of vLLM is an "
            "endpoint."
        )
    if options.endpoint_prompts == "ids" and not options.model:
        raise InputError("`--endpoint-prompts ids` needs `--model`, whose tokenizer makes the ids.")
    # everything that it refuses
    _endpoint(options)


def _endpoint(options: SamplingOptions) -> EndpointSampler:
    return EndpointSampler(
        options.client(),
        options.endpoint_model,
        form=options.endpoint_prompts,
        concurrency=options.endpoint_concurrency,
        choices=options.endpoint_choices,
    )


@contextmanager
def opened(options: SamplingOptions) -> Iterator[Opened]:
    """The sampler that `options` name; what only it needs is given back in the end.

    Raises:
        InputError: If anything cannot be loaded.
    """
    trust = options.trust_remote_code
    if options.endpoint is not None:
        tokenizer = None
        if options.model:
            tokenizer = load_tokenizer(options.model, trust_remote_code=trust)
        yield Opened(_endpoint(options), tokenizer, "endpoint")
        return
    if options.engine == "vllm":
        tokenizer = load_tokenizer(options.model, trust_remote_code=trust)
        engine = VllmEngine(
            resolve_model(options.model),
            dtype=options.dtype,
            trust_remote_code=trust,
            options=llm_arguments(options.vllm),
        )
        try:
            yield Opened(engine, tokenizer, "vllm")
        finally:
            engine.close()
        return
    model, tokenizer = load(options)
    sampler = TransformersSampler(model, tokenizer, max_tokens=options.max_tokens)
    yield Opened(sampler, tokenizer, model.device.type, model)


def llm_arguments(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE as arguments; values are read as YAML.

    Raises:
        InputError: If one is malformed.

    Example:
        >>> llm_arguments(["tensor_parallel_size=2", "enforce_eager=true"])
        {'tensor_parallel_size': 2, 'enforce_eager': True}
    """
    arguments = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"`vllm` must be NAME=VALUE, got {text!r}.")
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"`vllm` {name} must be a YAML value, got {value!r}.") from error
    return arguments


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
