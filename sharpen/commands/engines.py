"""What draws the completions of a command, made from its options.

    load_engine         the model in transformers, in vLLM, or an endpoint: `Engine`
    power_settings      those of a sampler of p^alpha: Metropolis-Hastings, particles
    sampling_config     how to draw

Options that contradict each other are rejected by `check_engine` and `power_settings`, before
anything is loaded.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
from sharpen.sampling.metropolis import Metropolis
from sharpen.sampling.smc import ParticleFilter
from sharpen.sampling.vllm_engine import VllmEngine

from .inputs import load
from .options import (
    OPENAI_HOST,
    OPENAI_KEY,
    DrawOptions,
    EndpointOptions,
    ModelOptions,
    SamplerOptions,
    SamplingOptions,
)

# settings of the samplers of p^alpha, and the options that they call otherwise
POWER = {"mh": Metropolis, "smc": ParticleFilter}
FIELDS = {"resample_every": "every", "resample_threshold": "threshold"}


@dataclass(frozen=True)
class Engine:
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


@contextmanager
def load_engine(options: SamplingOptions) -> Iterator[Engine]:
    """The sampler that `options` name; what only it needs is given back in the end."""
    if options.endpoint is None and options.engine == "transformers":
        model, tokenizer = load(options)
        sampler = TransformersSampler(model, tokenizer, max_tokens=options.max_tokens)
        yield Engine(sampler, tokenizer, model.device.type, model)
        return
    tokenizer = None
    if options.model:
        trust = options.trust_remote_code
        tokenizer = load_tokenizer(options.model, trust_remote_code=trust)
    if options.endpoint is not None:
        yield Engine(_endpoint_sampler(options), tokenizer, "endpoint")
        return
    with closing(load_vllm(options, options.vllm)) as engine:
        yield Engine(engine, tokenizer, "vllm")


def check_engine(options: SamplingOptions) -> None:
    """Reject contradictory options before anything is loaded."""
    if options.endpoint is None:
        if not options.model:
            raise InputError("`model` must be given, or `--endpoint`, got neither.")
        if options.vllm and options.engine != "vllm":
            raise InputError("`--vllm` must come with `--engine vllm`; leave one out.")
        for name in ("endpoint_model", "endpoint_key_env"):
            if getattr(options, name):
                raise InputError(
                    f"`--{name.replace('_', '-')}` must come with `--endpoint`; leave one out."
                )
        llm_arguments(options.vllm)
        return
    if options.engine == "vllm" or options.vllm:
        raise InputError(
            "give one of `--endpoint` and `--engine vllm`, got both; the server of vLLM is an "
            "endpoint."
        )
    if options.endpoint_prompts == "ids" and not options.model:
        raise InputError("`--endpoint-prompts ids` needs `--model`, whose tokenizer makes the ids.")
    # everything that it rejects
    _endpoint_sampler(options)


def load_vllm(options: ModelOptions, arguments: list[str]) -> VllmEngine:
    """VLLM with `--model`; `arguments` are further ones of vllm.LLM, as NAME=VALUE."""
    return VllmEngine(
        resolve_model(options.model),
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        options=llm_arguments(arguments),
    )


def llm_arguments(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE as arguments; values are read as YAML.

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


def _endpoint_sampler(options: SamplingOptions) -> EndpointSampler:
    return EndpointSampler(
        endpoint_client(options),
        options.endpoint_model,
        form=options.endpoint_prompts,
        concurrency=options.endpoint_concurrency,
        choices=options.endpoint_choices,
    )


def endpoint_client(options: EndpointOptions) -> EndpointClient:
    """The endpoint that `options` name, not yet called."""
    assert options.endpoint is not None
    patience = Patience(
        timeout_s=options.endpoint_timeout,
        tries=options.endpoint_tries,
        per_minute=options.endpoint_rpm,
    )
    return EndpointClient(options.endpoint, key=_endpoint_key(options), patience=patience)


def _endpoint_key(options: EndpointOptions) -> str | None:
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


def sampling_config(options: DrawOptions) -> SamplingConfig:
    """How to draw, as a sampler takes it."""
    return SamplingConfig(**options.draw_settings())


def power_settings(options: SamplerOptions) -> Metropolis | ParticleFilter | None:
    """The settings of a sampler of p^alpha; None for the model's own distribution."""
    given = {FIELDS.get(name, name): (name, value) for name, value in options.given().items()}
    for field, (name, _) in given.items():
        able = [key for key, kind in POWER.items() if field in kind.__dataclass_fields__]
        if options.sampler not in able:
            raise InputError(
                f"`--{name.replace('_', '-')}` must come with `--sampler` {' or '.join(able)}, got "
                f"{options.sampler}; leave one out."
            )
    if options.sampler == "model":
        return None
    return POWER[options.sampler](**{field: value for field, (_, value) in given.items()})
