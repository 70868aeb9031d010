"""Which causal-LM types of transformers are scored and sampled how, and how exactly.

    python -m bench.support --write                  # every type; the table into docs/models.md
    python -m bench.support --only llama --only bamba

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
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench._examine import Found, examine

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- support: python -m bench.support --write -->", "<!-- /support -->"
SECONDS = 120  # of one type


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


def table(found: list[Found]) -> str:
    """Markdown: what is supported, then what could not be tried."""
    names = ("type", "shares prompts in scoring", "head", "sampling", "largest error", "own noise")
    lines = [f"| {' | '.join(names)} |", "|---|---|---|---|---|---|"]
    for f in found:
        if f.verdict in ("right", "wrong"):
            error = f"{f.error:.0e}" + (f" **{f.why} wrong**" if f.verdict == "wrong" else "")
            cells = (f.model_type, f.sharing, f.head, f.sampling, error, f"{f.noise:.0e}")
            lines.append(f"| {' | '.join(cells)} |")
    refused = [f"`{f.model_type}` ({f.why})" for f in found if f.verdict == "refused"]
    lost = [f"`{f.model_type}` ({f.why})" for f in found if f.verdict == "not built"]
    counts = {v: sum(f.verdict == v for f in found) for v in ("right", "wrong")}
    head = (
        f"transformers {transformers.__version__}: {len(found)} types, {counts['right']} right, "
        f"{counts['wrong']} silently wrong, {len(refused)} refused with an error, "
        f"{len(lost)} of which no tiny model could be built.\n\n"
    )
    tail = (
        f"\n\nRefused: {', '.join(refused) or 'none'}.\n\nNot built: {', '.join(lost) or 'none'}."
    )
    return head + "\n".join(lines) + tail


def main() -> int:
    """Parse the flags; 0 unless a type is silently wrong."""
    parser = argparse.ArgumentParser(description="support for every causal-LM type")
    parser.add_argument("--only", action="append", help="a type; may be repeated")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    parser.add_argument("--out", type=Path, help="every finding, as JSON lines")
    args = parser.parse_args()
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
