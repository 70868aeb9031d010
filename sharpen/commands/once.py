"""What `sft` and `rlhf` have in common: sample once, rate, choose what to fit, fit it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from sharpen.errors import InputError
from sharpen.runs import Run
from sharpen.sampling.hf import TransformersSampler
from sharpen.sampling.prompts import render_all
from sharpen.scoring import Scorer
from sharpen.scoring.rewards import REWARDS
from sharpen.training.groups import Group
from sharpen.training.objectives import Objective
from sharpen.training.options import FitOptions

from .crew import Crew, Task
from .options import option
from .sources import open_source
from .training import (
    Drawn,
    TrainConfig,
    check_training,
    draw,
    finish,
    fit_into,
    load_base,
    outputs_of,
    rate,
    run_in_crew,
    samples_settings,
    training_settings,
)


@dataclass(frozen=True, kw_only=True)
class OnceConfig(TrainConfig):
    """What a command that samples once is told."""

    split: str = option("split of the task, or several as A+B", "sharpen")
    reward: str = option(f"self-reward: {', '.join(REWARDS)}", "logprob")
    samples: str | None = option(
        "a file of `sharpen sample`, of which the first N a prompt are used instead of drawing"
    )
    scores: Literal["scorer", "sampler"] = option(
        "log-probs of the base: scorer: a forward pass over all samples; "
        "sampler: those kept while drawing, which cost nothing",
        "scorer",
    )


@dataclass(frozen=True)
class Choice:
    """What is fitted.

    Attributes:
        groups: The completions, and what is known of them.
        objective: The loss.
        found: For the summary.
        what: How many of what, in words.
    """

    groups: list[Group]
    objective: Objective
    found: dict[str, Any]
    what: str


def fit_once(
    command: str, config: OnceConfig, own: dict[str, Any], choose: Callable[[Drawn], Choice]
) -> None:
    """Run a command that samples once, or go on with it.

    Args:
        command: Its name.
        config: Its options.
        own: Those of its options that no other training command has.
        choose: What to fit, of the samples that the base model has rated.
    """
    options = check_training(config, config.reward)
    run_in_crew(config, partial(_lead, command, config, own, choose, options))


def _lead(
    command: str,
    config: OnceConfig,
    own: dict[str, Any],
    choose: Callable[[Drawn], Choice],
    options: FitOptions,
    crew: Crew,
) -> None:
    draws = config.sampling()
    model, tokenizer = load_base(config)
    source = open_source(config, tokenizer)
    prompts = render_all(source.records, tokenizer)
    sampler = TransformersSampler(model, tokenizer, max_tokens=config.max_tokens)
    sampler.check(prompts, draws)
    out = Path(config.out)
    claimed = settings(command, config, own, model.device, crew.n)
    with Run(out / "run.json", claimed, outputs_of(out)):
        rows = draw(config, out, sampler, prompts, config.samples)
        scorer = Scorer(model, max_tokens=config.max_tokens)
        drawn = rate(out, scorer, source, rows, config.reward, config.scores)
        if not drawn.usable.any():
            raise InputError(
                f"no sample can be fitted: none of {len(drawn.usable)} was ended by the model with "
                "a finite log-prob and reward; raise `--max-new-tokens`."
            )
        choice = choose(drawn)
        task = Task(out, None, model.dtype, choice.groups, choice.objective, options)
        fit_into(crew, task, model, tokenizer)
        found = {"prompts": len(prompts), "prompts_fitted": len(choice.groups), **choice.found}
        of = f"of {len(choice.groups)} of {len(prompts)} prompts"
        finish(out, config, found, f"fitted {choice.what} {of}")


def settings(
    command: str,
    config: OnceConfig,
    own: dict[str, Any],
    device: torch.device,
    n_processes: int = 1,
) -> dict[str, Any]:
    """Everything that the outputs depend on."""
    return {
        **training_settings(command, config, device, n_processes),
        "reward": config.reward,
        "scores": config.scores,
        **own,
        **samples_settings(config.samples),
    }
