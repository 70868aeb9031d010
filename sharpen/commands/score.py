"""`sharpen score`: rate given completions under a model, one record at a time to disk.

A record holds a `prompt` (text or messages) and either one `completion` or a list of
`completions`; token ids (`prompt_ids`, `completion_ids`) are used as they are where given.
Each record comes back as it was, with `rewards` (one number, or one list a reward) and
`n_tokens`, and with `token_stats` where asked for. A completion whose logits are NaN gets null.
"""

import itertools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from sharpen.errors import InputError, RecordError
from sharpen.models import ModelLimits
from sharpen.records import (
    PromptRecord,
    Row,
    check_completions,
    check_ids,
    check_prompt,
    file_digest,
    has,
    read_rows,
    template_fields,
)
from sharpen.runs import Journal, Run
from sharpen.sampling.base import render
from sharpen.scoring import Scorer
from sharpen.scoring.rewards import REWARDS, options_needed, stats_needed
from sharpen.scoring.token_stats import check_temperature
from sharpen.text import TextCodec

from .inputs import load, model_settings
from .options import ScoreConfig
from .stages import json_numbers, nested_stats, settings_beside

log = logging.getLogger("sharpen")

# records scored and written together; a crash loses at most these
CHUNK = 32


@dataclass(frozen=True)
class Record:
    """One line of the input, as token ids."""

    place: str
    row: Row
    prompt_ids: list[int]
    completion_ids: list[list[int]]


def run(config: ScoreConfig) -> None:
    """Run the command, or go on with it."""
    needs = check_rewards(config.rewards)
    check_temperature(config.temperature)
    # a missing or unreadable file is reported before a model is loaded
    next(read_rows(config.input), None)
    model, tokenizer = load(config)
    codec = TextCodec(tokenizer, model.generation_config)
    if config.add_eos:
        codec.check_has_end()
    records_of = partial(read_records, config.input, codec, ModelLimits.of(model))
    # everything is read and checked once before the first line is written
    n_records = sum(1 for _ in records_of(add_eos=config.add_eos))
    if n_records == 0:
        raise InputError(f"{config.input!r} must hold at least one record, got none.")
    codec.warn_merged()
    out = Path(config.out)
    settings = {
        "command": "score",
        **model_settings(config, model.device.type),
        "input_digest": file_digest(config.input),
        "rewards": config.rewards,
        "token_stats": config.token_stats,
        "add_eos": config.add_eos,
        "temperature": config.temperature,
    }
    scorer = Scorer(model, tokenizer=tokenizer, max_tokens=config.max_tokens)
    with Run(settings_beside(out), settings, [out]):
        journal = Journal(out)
        done, n_bad = len(journal.rows), 0
        with tqdm(total=n_records, initial=done, desc="score", unit="record") as bar:
            records = itertools.islice(records_of(add_eos=config.add_eos), done, None)
            while chunk := list(itertools.islice(records, CHUNK)):
                scored = score_records(scorer, chunk, config, needs)
                journal.append(scored)
                n_bad += _warn_of_nan(chunk, scored)
                bar.update(len(chunk))
    note = f", {n_bad} with NaN logits" if n_bad else ""
    sys.stdout.write(f"{n_records} records{note}: {config.out}\n")


def check_rewards(rewards: list[str]) -> tuple[str, ...]:
    """Token statistics behind `rewards`."""
    for name in rewards:
        if name not in REWARDS:
            raise InputError(f"`rewards` must be among {', '.join(REWARDS)}, got {name!r}.")
        if options_needed(name):
            raise InputError(f"`rewards` {name} needs answers, which only `sharpen bon` has.")
    return tuple(dict.fromkeys(["logprob", *(s for name in rewards for s in stats_needed(name))]))


def read_records(
    path: str, codec: TextCodec, limits: ModelLimits, *, add_eos: bool = False
) -> Iterator[Record]:
    """Every record of a file, tokenised and within the model's limits."""
    for place, row in read_rows(path):
        prompt = check_prompt(place, row)
        text: str | list[int]
        if row.get("prompt_ids") is not None:
            text = prompt_ids = check_ids(place, "prompt_ids", row["prompt_ids"])
        else:
            template = {} if isinstance(prompt, str) else template_fields(place, row)
            record = PromptRecord(place, place, prompt, template)
            rendered = render(record, codec.tokenizer)
            text, prompt_ids = rendered.text, list(rendered.ids)
        groups = _given_ids(place, row)
        if groups is None:
            texts = check_completions(place, row)
            groups = codec.completion_ids(text, texts, is_ended=add_eos)
        for ids in groups:
            # the last token is predicted, and never read
            limits.check(place, prompt_ids, ids, unread=min(1, len(ids)))
        yield Record(place, row, prompt_ids, groups)


def _given_ids(place: str, row: Row) -> list[list[int]] | None:
    """The token ids of a record's completions, if it has them."""
    texts, given = check_completions(place, row), row.get("completion_ids")
    if given is None:
        return None
    groups = [given] if has(row, "completion") else given
    if not isinstance(groups, list) or len(groups) != len(texts):
        raise RecordError(f"{place}: `completion_ids` must hold {len(texts)} lists of integers.")
    return [check_ids(place, "completion_ids", ids) for ids in groups]


def score_records(
    scorer: Scorer, records: list[Record], config: ScoreConfig, needs: tuple[str, ...]
) -> list[Row]:
    """The records with their rewards."""
    scores = scorer.score(
        [record.prompt_ids for record in records],
        [record.completion_ids for record in records],
        stats=needs,
        temperature=config.temperature,
    )
    rewards = {
        name: [json_numbers(r.tolist()) for r in scores.by_prompt(name)] for name in config.rewards
    }
    stats = nested_stats(scores, needs) if config.token_stats else {}
    rows = []
    for p, record in enumerate(records):
        single = has(record.row, "completion")
        lengths = [len(ids) for ids in record.completion_ids]
        row = dict(record.row)
        row["rewards"] = {name: r[p][0] if single else r[p] for name, r in rewards.items()}
        row["n_tokens"] = lengths[0] if single else lengths
        if config.token_stats:
            row["token_stats"] = {k: v[p][0] if single else v[p] for k, v in stats.items()}
        rows.append(row)
    return rows


def _warn_of_nan(records: list[Record], rows: list[Row]) -> int:
    n_bad = 0
    for record, row in zip(records, rows, strict=True):
        values = next(iter(row["rewards"].values()))
        if any(v is None for v in (values if isinstance(values, list) else [values])):
            log.warning("%s: the model's logits are NaN; its reward is null.", record.place)
            n_bad += 1
    return n_bad
