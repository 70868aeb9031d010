"""`sharpen sample`: draw N completions a prompt into one JSON lines file."""

import sys
from dataclasses import dataclass
from pathlib import Path

from sharpen.runs import Run
from sharpen.sampling.prompts import render_all

from .options import DrawOptions, ModelOptions, PromptOptions, required
from .samplers import SamplerOptions, open_sampler
from .sources import check_source, load, model_settings, open_source, source_settings
from .stages import sample_into, settings_beside


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplerOptions, DrawOptions, PromptOptions, ModelOptions):
    """Sample completions."""

    out: str = required("JSON lines file to write; the same command again goes on with it")


def run(config: SampleConfig) -> None:
    """Run the command, or go on with it."""
    check_source(config)
    draws, power = config.sampling(), config.power()
    model, tokenizer = load(config)
    prompts = render_all(open_source(config, tokenizer).records, tokenizer)
    sampler = open_sampler(power, model, tokenizer, config.max_tokens)
    sampler.check(prompts, draws)
    out = Path(config.out)
    settings = {
        "command": "sample",
        **model_settings(config, model.device.type),
        **source_settings(config),
        **config.draw_settings(),
        **config.sampler_settings(),
    }
    with Run(settings_beside(out), settings, [out]):
        rows = sample_into(out, sampler, prompts, draws, label="sample")
    n_tokens = sum(len(ids) for row in rows for ids in row["completion_ids"])
    sys.stdout.write(
        f"{len(rows)} prompts x {config.n} completions, {n_tokens} tokens: {config.out}\n"
    )
