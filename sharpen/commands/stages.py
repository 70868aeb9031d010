"""Stages that commands share, each a journal that a killed run goes on with, and their records.

sample_into         draw completions into a file, one prompt a line
score_samples       token statistics of samples into a file, one prompt a line
samples_row, ...    between records and what samplers and scorers take and give
"""

import itertools
import logging
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sharpen.ends import is_natural
from sharpen.records import Row, write_rows
from sharpen.runs import Journal
from sharpen.sampling import Prompt, Sampler, Samples, SamplingConfig
from sharpen.scoring import Scorer, Scores
from sharpen.text import TextCodec
from sharpen_kernels import TokenStats

log = logging.getLogger("sharpen")

# files of a run directory
RUN, SAMPLES, SCORES = "run.json", "samples.jsonl", "scores.jsonl"
SUMMARY, TIMINGS = "summary.json", "timings.jsonl"
# prompts scored and written together; a crash loses at most these
CHUNK = 16


def sample_into(
    path: Path,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    label: str = "sample",
    timings: Journal | None = None,
) -> list[Row]:
    """Draw what `path` does not hold yet; return all its rows, one a prompt, in input order.

    Every finished prompt is on disk before the next batch starts. `timings` gets one row a
    batch, so that a resumed run still knows what it cost.
    """
    journal = Journal(path)
    rows = {row["prompt_id"]: row for row in journal.rows}
    by_id = {prompt.id: prompt for prompt in prompts}
    started = time.monotonic()
    with tqdm(total=len(prompts), initial=len(rows), desc=label, unit="prompt") as bar:
        for finished in sampler.sample(prompts, config, done=set(rows)):
            fresh = [samples_row(by_id[samples.prompt_id], samples) for samples in finished]
            journal.append(fresh)
            # insertion order is the order of the file
            rows |= {row["prompt_id"]: row for row in fresh}
            if timings is not None:
                now = time.monotonic()
                timings.append([{"stage": label, "seconds": now - started}])
                started = now
            for samples in finished:
                _warn_of_nan(by_id[samples.prompt_id], samples)
            bar.update(len(finished))
    ordered = [rows[prompt.id] for prompt in prompts]
    if list(rows) != [prompt.id for prompt in prompts]:
        write_rows(path, ordered)
    return ordered


def score_samples(
    path: Path, scorer: Scorer, samples: list[Row], stats: tuple[str, ...], timings: Journal
) -> Scores:
    """Token statistics of every sample, kept in `path` one prompt a line."""
    journal = Journal(path)
    rows = list(journal.rows)
    started = time.monotonic()
    with tqdm(total=len(samples), initial=len(rows), desc="score", unit="prompt") as bar:
        # a chunk that a crash tore is scored whole again: its bits are those of its batches
        whole = len(rows) - len(rows) % CHUNK if len(rows) < len(samples) else len(rows)
        for start in range(whole, len(samples), CHUNK):
            chunk = samples[start : start + CHUNK]
            scores = scorer.score(
                [row["prompt_ids"] for row in chunk],
                [row["completion_ids"] for row in chunk],
                stats=stats,
            )
            nested = nested_stats(scores, stats)
            fresh = [
                {"prompt_id": row["prompt_id"], **{name: nested[name][p] for name in stats}}
                for p, row in enumerate(chunk)
                if start + p >= len(rows)
            ]
            journal.append(fresh)
            rows += fresh
            now = time.monotonic()
            timings.append([{"stage": "score", "seconds": now - started}])
            started = now
            bar.update(len(fresh))
    lengths = [[len(ids) for ids in row["completion_ids"]] for row in samples]
    columns = {
        name: torch.tensor(
            [x for row in rows for tokens in row[name] for x in numbers(tokens)],
            dtype=torch.float32,
        )
        for name in stats
    }
    return Scores.of(TokenStats(**columns), lengths, [is_finished(row) for row in samples])


def seconds_of(*timings: Path) -> dict[str, float]:
    """What each stage took, of all the times that it was gone on with."""
    seconds: dict[str, float] = {}
    for path in timings:
        for row in Journal(path).rows:
            seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    return seconds


def versions_of(*packages: str) -> dict[str, str]:
    """Of what computed the numbers."""
    return {name: metadata.version(name) for name in packages}


def some_samples(row: Row, start: int, end: int) -> Row:
    """A record of samples with those alone from `start` to before `end`.

    Example:
        >>> some_samples({"prompt_id": "p", "completions": ["a", "b"]}, 0, 1)
        {'prompt_id': 'p', 'completions': ['a']}
    """
    lists = {"completions", "completion_ids", "tokens", "logprobs", "finish_reasons"}
    names = lists & row.keys()
    return row | {name: row[name][start:end] for name in names}


def token_keys(row: Row) -> list[tuple[int | str, ...]]:
    """What the tokens of each completion are told apart by: ids, or the text a server gives."""
    return [tuple(tokens) for tokens in row.get("completion_ids", row.get("tokens", []))]


def with_ids(row: Row, codec: TextCodec) -> Row:
    """The record with token ids; text is tokenised where a server gave none.

    The prompt gets the tokenizer's special tokens, a completion that its model ended the token that
    ends it. They are tokens of this tokenizer, and need not be those that the server's model drew.
    """
    found = {}
    if "prompt_ids" not in row:
        found["prompt_ids"] = codec.prompt_ids(row["prompt"])
    if "completion_ids" not in row:
        prompt, texts = row["prompt"], row["completions"]
        found["completion_ids"] = codec.completion_ids(prompt, texts, is_ended=is_finished(row))
    return row | found


def kept_scores(samples: list[Row]) -> Scores:
    """Scores without a forward: of the log-probs in the records of samples."""
    logprobs = [[numbers(tokens) for tokens in row["logprobs"]] for row in samples]
    return Scores.from_logprobs(logprobs, [is_finished(row) for row in samples])


def samples_row(prompt: Prompt, samples: Samples) -> Row:
    """The record of one prompt's samples; without ids where only a server knows them."""
    return {
        "prompt_id": prompt.id,
        "prompt": prompt.text,
        **({"prompt_ids": list(prompt.ids)} if prompt.ids else {}),
        "completions": samples.completions,
        **({"completion_ids": samples.completion_ids} if samples.completion_ids else {}),
        "logprobs": [json_numbers(row) for row in samples.logprobs],
        "finish_reasons": samples.finish_reasons,
        # what a sampler gives beside its samples, such as log Z
        **{
            name: json_numbers([value])[0] if isinstance(value, float) else value
            for name, value in vars(samples).items()
            if name not in Samples.__dataclass_fields__
        },
    }


def json_numbers(values: Sequence[float]) -> list[float | None]:
    """fp32 numbers in as few digits as name them; what JSON cannot say (NaN, inf) is null."""
    return [
        float(str(value)) if np.isfinite(value) else None
        for value in np.asarray(values, dtype=np.float32)
    ]


def numbers(values: Iterable[float | int | None]) -> list[float]:
    """Numbers of a record: null is NaN."""
    return [float("nan") if x is None else float(x) for x in values]


def nested_stats(scores: Scores, stats: Sequence[str]) -> dict[str, list[list[list[float | None]]]]:
    """Token statistics as lists: one a prompt, of one a completion, of one number a token."""
    bounds = scores.offsets.tolist()
    nested = {}
    for name in stats:
        values = json_numbers(getattr(scores.tokens, name).tolist())
        completions = [values[a:b] for a, b in itertools.pairwise(bounds)]
        groups = itertools.pairwise(scores.groups.tolist())
        nested[name] = [completions[a:b] for a, b in groups]
    return nested


def is_finished(row: Row) -> list[bool]:
    """Which samples of a record the model ended by itself, within the token limit."""
    return [is_natural(reason) for reason in row["finish_reasons"]]


def _warn_of_nan(prompt: Prompt, samples: Samples) -> None:
    bad = [i for i, reason in enumerate(samples.finish_reasons) if reason == "nan"]
    if bad:
        log.warning(
            "%s: the model's logits are NaN for %d of %d samples (first: sample %d); "
            "they are kept as they are and never chosen.",
            *(prompt.place, len(bad), len(samples.finish_reasons), bad[0]),
        )


def settings_beside(path: Path) -> Path:
    """Where the settings of a single output file live."""
    return path.with_name(f"{path.name}.run.json")
