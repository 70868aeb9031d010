"""`sharpen parity`: how far another engine's log-probs of the same tokens are from ours.

Reads the completions of a JSON lines file (as `sharpen score` does), rates them by our scorer and
by another engine, and reports the differences token by token. Exit code 0: within `--tolerance`;
1: above it; 2: bad input.
"""

import gc
import json
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError, check_fields
from sharpen.evaluation.parity import (
    Pairs,
    compare,
    finite,
    format_parity,
    forward_logprobs,
    in_context,
    is_within,
    kept_logprobs,
    pair,
    server_logprobs,
    worst,
)
from sharpen.models import ModelLimits
from sharpen.records import read_rows, write_text
from sharpen.scoring import Scorer
from sharpen.text import TextCodec

from .engines import endpoint_client, llm_arguments, load_vllm
from .inputs import load, model_settings
from .options import ParityConfig
from .score import Record, read_records

# sequences rated together
CHUNK = 32


def run(config: ParityConfig) -> None:
    """Run the command."""
    check(config)
    next(read_rows(config.samples), None)
    ours = rated_by_us(config)
    # another engine of this process wants the memory
    free()
    theirs = rate(config, ours.model, ours.records)
    pairs = pair(ours.logprobs, theirs)
    found = compare(pairs, clip=config.clip)
    report = {
        "ours": f"sharpen ({ours.sharing})",
        "theirs": config.against,
        # what the numbers depend on
        "settings": {
            **model_settings(config, ours.device),
            "samples": config.samples,
            "endpoint": config.endpoint,
            "endpoint_model": config.endpoint_model or None,
            "vllm": config.vllm,
        },
        "tolerance": config.tolerance,
        "measure": config.measure,
        "is_within": is_within(found, config.tolerance, config.measure),
        "differences": found,
        "worst": [
            _shown(pairs, i, ours.records, ours.tokenizer) for i in worst(pairs, config.worst)
        ],
    }
    sys.stdout.write(format_parity(report) + "\n")
    if config.out is not None:
        write_text(config.out, json.dumps(finite(report), indent=2, allow_nan=False) + "\n")
        sys.stdout.write(f"report: {config.out}\n")
    if not report["is_within"]:
        raise SystemExit(1)


class Ours(NamedTuple):
    """Our side, and what the rest needs of it.

    Attributes:
        records: That were rated.
        logprobs: Of each token of each completion of each record, nats.
        tokenizer: Of the model.
        sharing: How prompts were shared.
        device: Where the model ran.
        model: Where the other side runs it too, else None: its memory is free.
    """

    records: list[Record]
    logprobs: list[list[list[float]]]
    tokenizer: PreTrainedTokenizerBase
    sharing: str
    device: str
    model: PreTrainedModel | None


def rated_by_us(config: ParityConfig) -> Ours:
    """Read the records and rate them; the model is held on to for `--against hf` alone."""
    model, tokenizer = load(config)
    codec = TextCodec(tokenizer, model.generation_config)
    records = list(read_records(config.samples, codec, ModelLimits.of(model)))[: config.limit]
    scorer = Scorer(model, tokenizer=tokenizer, max_tokens=config.max_tokens)
    found = _in_chunks(records, lambda chunk: _scored(scorer, chunk), "ours")
    kept = model if config.against == "hf" else None
    return Ours(records, found, tokenizer, scorer.route.sharing, model.device.type, kept)


def free() -> None:
    """Give back the memory of models that nothing refers to any more."""
    # hooks and caches of a model refer to it in circles
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check(config: ParityConfig) -> None:
    """Reject bad options before anything is loaded."""
    rules = [
        ("tolerance", 0 <= config.tolerance < float("inf"), "at least 0 and finite"),
        ("clip", 0 < config.clip < float("inf"), "positive and finite"),
        ("worst", config.worst >= 0, "at least 0"),
        ("limit", config.limit is None or config.limit >= 1, "at least 1"),
    ]
    check_fields(config, rules)
    if (config.against == "server") != (config.endpoint is not None):
        raise InputError("`--against server` and `--endpoint` must come together; got one.")
    if config.endpoint is not None:
        if not config.endpoint_model:
            raise InputError("`endpoint_model` must be given with `--endpoint`: its name there.")
        endpoint_client(config)
    if config.vllm and config.against != "vllm":
        raise InputError("`--vllm` must come with `--against vllm`; leave one out.")
    llm_arguments(config.vllm)
    if config.out is not None and Path(config.out).exists():
        raise InputError(f"`out` {config.out!r} exists; choose another or move it away.")
    if config.out is not None and not Path(config.out).resolve().parent.is_dir():
        raise InputError(f"`out` {config.out!r} must be in a folder that exists; make it first.")


def rate(
    config: ParityConfig, model: PreTrainedModel | None, records: list[Record]
) -> list[list[list[float]]]:
    """Log-probs of every completion by the other engine; `model` is for a plain forward."""
    prompts = [record.prompt_ids for record in records]
    completions = [record.completion_ids for record in records]
    if config.against == "sampler":
        return kept_logprobs([record.place for record in records], [r.row for r in records])
    if config.against == "hf":
        assert model is not None, "kept by `rated_by_us`"
        return _in_chunks(
            records,
            lambda chunk: forward_logprobs(
                model, [r.prompt_ids for r in chunk], [r.completion_ids for r in chunk]
            ),
            "hf",
        )
    if config.against == "server":
        with tqdm(total=sum(map(len, completions)), desc="server", unit="completion") as bar:
            return server_logprobs(
                endpoint_client(config),
                config.endpoint_model,
                prompts,
                completions,
                concurrency=config.endpoint_concurrency,
                progress=bar.update,
            )
    with closing(load_vllm(config, config.vllm)) as engine:
        return engine.logprobs(prompts, completions)


def _scored(scorer: Scorer, records: list[Record]) -> list[list[list[float]]]:
    scores = scorer.score(
        [record.prompt_ids for record in records], [record.completion_ids for record in records]
    )
    assert scores.tokens.logprob is not None
    flat = iter(scores.tokens.logprob.tolist())
    return [[[next(flat) for _ in ids] for ids in r.completion_ids] for r in records]


def _in_chunks(
    records: list[Record], work: Callable[[list[Record]], list[list[list[float]]]], label: str
) -> list[list[list[float]]]:
    found: list[list[list[float]]] = []
    with tqdm(total=len(records), desc=label, unit="record") as bar:
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            found += work(chunk)
            bar.update(len(chunk))
    return found


def _shown(
    pairs: Pairs, index: int, records: list[Record], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    place = pairs.places[index]
    record = records[place.p]
    ids = record.completion_ids[place.g]
    name = record.row.get("prompt_id", record.place)
    shown = in_context(
        pairs, index, record.prompt_ids, ids, lambda tokens: str(tokenizer.decode(tokens))
    )
    return {"place": str(name), **shown}
