"""Which causal-LM types of transformers are scored and sampled how, and how exactly.

    python -m bench.support --write                  # every type; the table into docs/models.md
    python -m bench.support --only llama --only bamba
    python -m bench.support --check                  # a fixed sample, one of each kind of route

For each type a tiny random model is built, its routes are found as for any model, and the scores
of 24 completions of four prompts are compared with the model's own logits of each sequence alone,
greedy tokens with those of its own `generate`. Fails if any type is silently wrong.
"""

import argparse
import dataclasses
import json
import logging
import multiprocessing
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench._examine import Found, examine
from bench._support_table import table

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- support: python -m bench.support --write -->", "<!-- /support -->"
SECONDS = 420  # of one type
SAMPLE = {  # sharing in scoring, sampling
    "bloom": ("cache", "generate"), "deepseek_v2": ("tree", "shared"),
    "exaone4": ("tree", "shared"), "falcon_mamba": ("none", "generate"),
    "granitemoehybrid": ("cache", "generate"), "gemma3n_text": ("tree", "shared"),
    "llama4_text": ("cache", "shared"), "qwen3_5_text": ("cache", "generate"),
    "roberta": ("none", "generate"), "xlnet": ("-", "-"), "zamba2": ("cache", "generate"),
}  # fmt: skip


def _child(model_type: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pipe.send(dataclasses.asdict(examine(model_type)))


def asked(model_type: str) -> Found:
    """`examine` in a process of its own, which may hang or die."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=_child, args=(model_type, there))
    process.start()
    there.close()
    try:
        found = (
            Found(**here.recv())
            if here.poll(SECONDS)
            else Found(model_type, "not built", f"no answer in {SECONDS} s")
        )
    except EOFError:
        found = Found(model_type, "not built", "its process ended")
    process.kill()
    process.join()
    return found


def check() -> int:
    """0 if the sample takes its routes and none of it is wrong."""
    found = [asked(name) for name in SAMPLE]
    for one in found:
        print(one)
    refused = {one.model_type for one in found if one.verdict == "refused"}
    routes = {one.model_type: (one.sharing, one.sampling) for one in found}
    sound = routes == SAMPLE and refused == {"xlnet"}
    return 0 if sound and all(one.verdict in ("right", "refused") for one in found) else 1


def main() -> int:
    """Parse the flags; 0 unless a type is silently wrong."""
    parser = argparse.ArgumentParser(description="support for every causal-LM type")
    parser.add_argument("--only", action="append", help="a type; may be repeated")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--out", type=Path, help="every finding, as JSON lines")
    parser.add_argument("--check", action="store_true", help="a fixed sample takes its routes")
    args = parser.parse_args()
    if args.check:
        return check()
    found = []
    for model_type in args.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        start = time.perf_counter()
        one = asked(model_type)
        found.append(one)
        columns = f"{model_type:28s} {one.verdict:10s} {one.sharing:6s} {one.sampling:9s}"
        took = f"{time.perf_counter() - start:5.1f} s"
        print(columns, f"{one.error or 0:.1e}", took, one.why, file=sys.stderr, flush=True)
    text = table(found)
    print(text)
    if args.out:
        args.out.write_text("".join(json.dumps(dataclasses.asdict(f)) + "\n" for f in found))
    if args.write:
        page = PAGE.read_text()
        before, _, rest = page.partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    return 1 if any(f.verdict == "wrong" for f in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
