"""`sharpen sample`: draw N completions a prompt into one JSON lines file."""

import sys
from pathlib import Path

from sharpen.errors import InputError
from sharpen.runs import Run
from sharpen.sampling.base import render_all
from sharpen.sampling.metropolis import Metropolis, MetropolisSampler
from sharpen.sampling.smc import ParticleSampler

from .engines import check_engine, load_engine, power_settings, sampling_config
from .inputs import check_source, model_settings, open_source, source_settings
from .options import SampleConfig
from .stages import sample_into, settings_beside


def run(config: SampleConfig) -> None:
    """Run the command, or go on with it."""
    check_source(config)
    draws, power = sampling_config(config), power_settings(config)
    check_engine(config)
    if power is not None and (config.endpoint is not None or config.engine != "transformers"):
        raise InputError(
            f"`--sampler` {config.sampler} must run in transformers; leave out `--endpoint` and "
            "`--engine`."
        )
    with load_engine(config) as engine:
        prompts = render_all(open_source(config, engine.tokenizer).records, engine.tokenizer)
        sampler = engine.sampler
        if power is not None:
            assert engine.model is not None
            assert engine.tokenizer is not None
            parts = engine.model, engine.tokenizer
            if isinstance(power, Metropolis):
                sampler = MetropolisSampler(*parts, power, max_tokens=config.max_tokens)
            else:
                sampler = ParticleSampler(*parts, power, max_tokens=config.max_tokens)
        sampler.check(prompts, draws)
        out = Path(config.out)
        settings = {
            "command": "sample",
            **model_settings(config, engine.device),
            **source_settings(config),
            **config.draw_settings(),
            **config.sampler_settings(),
            **config.engine_settings(),
        }
        with Run(settings_beside(out), settings, [out]):
            rows = sample_into(out, sampler, prompts, draws)
    n_tokens = sum(len(tokens) for row in rows for tokens in row["logprobs"])
    sys.stdout.write(
        f"{len(rows)} prompts x {config.n} completions, {n_tokens} tokens: {config.out}\n"
    )
