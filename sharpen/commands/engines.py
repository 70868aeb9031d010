"""What draws the completions of a command: the model in transformers or vLLM, or an endpoint.

Which sampler a command draws with: the model's own law, or its power p^alpha in two ways.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError
from sharpen.models import load_tokenizer, resolve_model
from sharpen.sampling import SamplingConfig
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
from .options import (
    OPENAI_HOST,
    OPENAI_KEY,
    DrawOptions,
    EndpointOptions,
    SamplerOptions,
    SamplingOptions,
)


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


def endpoint_client(options: EndpointOptions) -> EndpointClient:
    """The endpoint that `options` name, not yet called."""
    assert options.endpoint is not None
    check_url(options.endpoint)
    patience = Patience(
        timeout_s=options.endpoint_timeout,
        tries=options.endpoint_tries,
        per_minute=options.endpoint_rpm,
    )
    return EndpointClient(options.endpoint, key=_endpoint_key(options), patience=patience)


def _endpoint_key(options: EndpointOptions) -> str | None:
    """The key, from the environment variable that was named, or OpenAI's own for its host."""
    assert options.endpoint is not None
    check_url(options.endpoint)
    name = options.endpoint_key_env
    if name is None and urlsplit(options.endpoint).hostname == OPENAI_HOST:
        name = OPENAI_KEY
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise InputError(
            f"`endpoint` needs its key in the environment variable {name}, which is not set; "
            "export it, or name another one by `--endpoint-key-env`."
        )
    check_key(options.endpoint, key)
    return key


def _endpoint(options: SamplingOptions) -> EndpointSampler:
    return EndpointSampler(
        endpoint_client(options),
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


def sampling_config(options: DrawOptions) -> SamplingConfig:
    """How to draw, as a sampler takes it."""
    return SamplingConfig(**options.draw_settings())


def power_settings(options: SamplerOptions) -> Metropolis | ParticleFilter | None:
    """The settings of a sampler of p^alpha; None for the model's own distribution."""
    given = options.given()
    for name in given:
        if options.sampler not in OF[name]:
            flag = name.replace("_", "-")
            raise InputError(
                f"`--{flag}` must come with `--sampler` {' or '.join(OF[name])}, got "
                f"{options.sampler}; leave one out."
            )
    if options.sampler == "model":
        return None
    kind = Metropolis if options.sampler == "mh" else ParticleFilter
    return kind(**{FIELDS.get(name, name): value for name, value in given.items()})


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
