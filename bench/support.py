"""Which causal-LM types of transformers are scored and sampled how, and how exactly.

    python -m bench.support --write                  # every type; the table into docs/models.md
    python -m bench.support --only llama --only bamba
    python -m bench.support --check                  # a fixed sample, one of each kind of route

For each type a tiny random model is built, its routes are found as for any model, and the scores
of 24 completions of four prompts are compared with the model's own logits of each sequence alone,
greedy tokens with those of its own `generate`. Fails if any type is silently wrong.

In reading order: the command; one type, examined; what the model itself says; the table.
"""

import argparse
import copy
import dataclasses
import json
import logging
import multiprocessing
import time
import warnings
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bench._measure import say, steps, write_between
from bench._tiny_models import V, tiny_model
from bench.peers.finding import reason
from sharpen import Scorer
from sharpen.errors import SharpenError
from sharpen.sampling import Prompt, SamplingConfig
from sharpen.sampling.hf import TransformersSampler

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- support: python -m bench.support --write -->", "<!-- /support -->"
SECONDS = 420  # of one type
SAMPLE = {  # sharing in scoring, sampling
    "bloom": ("cache", "generate"),
    "deepseek_v2": ("tree", "shared"),
    "exaone4": ("tree", "shared"),
    "falcon_mamba": ("none", "generate"),
    "granitemoehybrid": ("cache", "generate"),
    "gemma3n_text": ("tree", "shared"),
    "llama4_text": ("cache", "shared"),
    "qwen3_5_text": ("cache", "generate"),
    "roberta": ("none", "generate"),
    "xlnet": ("-", "-"),
    "zamba2": ("cache", "generate"),
}
NEW = 12  # tokens sampled
FLOOR_NATS = 2e-5
NOISE_FACTOR = 8  # of what fp32 costs the model itself
WRONG_NATS = 1e-3  # more is no rounding


def ids(n: int, seed: int) -> list[int]:
    """Random token ids that are no special token."""
    return torch.randint(3, V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


HEADER = ids(20, 1)
PROMPTS = [HEADER + ids(9, 2), HEADER + ids(12, 3), ids(41, 4), ids(3, 5)]
OPENING = ids(10, 6)
COMPLETIONS = [
    [OPENING + ids(n, 10 * p + n) for n in (3, 8)] + [ids(n, 99 * p + n) for n in (1, 7, 30, 12)]
    for p in range(len(PROMPTS))
]


@dataclasses.dataclass
class Found:
    """What came of one type; `verdict` is "right", "wrong", "refused" or "not built"."""

    model_type: str
    verdict: str
    why: str = ""
    sharing: str = "-"
    head: str = "-"
    sampling: str = "-"
    error: float | None = None
    noise: float | None = None


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
    for model_type in steps(args.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        start = time.perf_counter()
        one = asked(model_type)
        found.append(one)
        columns = f"{model_type:28s} {one.verdict:10s} {one.sharing:6s} {one.sampling:9s}"
        took = f"{time.perf_counter() - start:5.1f} s"
        say(f"{columns} {one.error or 0:.1e} {took} {one.why}")
    text = table(found)
    print(text)
    if args.out:
        args.out.write_text("".join(json.dumps(dataclasses.asdict(f)) + "\n" for f in found))
    if args.write:
        write_between(PAGE, BEGIN, END, text)
    return 1 if any(f.verdict == "wrong" for f in found) else 0


def check() -> int:
    """0 if the sample takes its routes and none of it is wrong."""
    found = [asked(name) for name in steps(SAMPLE)]
    for one in found:
        print(one)
    refused = {one.model_type for one in found if one.verdict == "refused"}
    routes = {one.model_type: (one.sharing, one.sampling) for one in found}
    sound = routes == SAMPLE and refused == {"xlnet"}
    return 0 if sound and all(one.verdict in ("right", "refused") for one in found) else 1


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


def _child(model_type: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    pipe.send(dataclasses.asdict(examine(model_type)))


def examine(model_type: str) -> Found:
    """Build, find routes, compare."""
    try:
        model = tiny_model(model_type)
        with torch.no_grad():
            want = alone(model)
    except Exception as error:  # of someone else's code, on sizes it was not made for
        return Found(model_type, "not built", reason(error))
    found = Found(model_type, "right")
    try:
        with torch.no_grad():
            scorer = Scorer(model)
            got = scorer.score(PROMPTS, COMPLETIONS).tokens.logprob
            assert got is not None
            found.sharing, found.head = scorer.route
        found.error = (got.double() - want).abs().max().item()
        found.noise = noise_of(model, want)
        if not found.error <= max(FLOOR_NATS, NOISE_FACTOR * found.noise):
            found.verdict, found.why = "wrong", "scores"
        found.sampling, same = greedy(model)
        if not same:
            found.verdict, found.why = "wrong", "greedy tokens"
    except SharpenError as error:
        found.verdict, found.why = "refused", reason(error)
    except Exception as error:  # the same
        found.verdict, found.why = "refused", f"raises {reason(error)}"
    return found


def noise_of(model: Any, want: torch.Tensor) -> float:
    """What fp32 costs the model itself: by a padded batch of its own, and beside fp64.

    Either counts as 0 where the model cannot do it, or is not right (some read their padding).
    """
    found = [0.0]
    for way in (padded, lambda m: alone(wide(m))):
        try:
            with torch.no_grad():
                found.append((way(model) - want).abs().max().item())
        except Exception:  # of someone else's code
            continue
    return max(x for x in found if x < WRONG_NATS)


def greedy(model: Any) -> tuple[str, bool]:
    """The sampler's way, and whether its greedy tokens are those of `generate`.

    Or of the model run on whole sequences: some `generate` from a cache that is not their own.
    """
    words = tokenizers.models.WordLevel({str(i): i for i in range(V)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    sampler = TransformersSampler(model, tokenizer)
    sampler.eos_ids = ()
    prompts = [Prompt(str(i), "", tuple(p), str(i)) for i, p in enumerate(PROMPTS)]
    config = SamplingConfig(n=2, temperature=0.0, max_new_tokens=NEW)
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)
    same = True
    for batch in sampler.sample(prompts, config):
        for samples in batch:
            prompt = PROMPTS[int(samples.prompt_id)]
            row = torch.tensor([prompt])
            mask = torch.ones_like(row)
            out = model.generate(
                input_ids=row, attention_mask=mask, max_new_tokens=NEW, do_sample=False
            )
            own = out[0, len(prompt) :].tolist()
            found = samples.completion_ids  # of one prompt, so greedy ones are equal
            same &= all(x == own for x in found) or found[0] == recomputed(model, prompt)
    return sampler.route, same


def alone(model: Any) -> torch.Tensor:
    """Log-probs by the model's own logits, each sequence by itself."""
    found = []
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
        for completion in group:
            row = torch.tensor([prompt + completion])
            logits = model(input_ids=row).logits[0, len(prompt) - 1 : -1].double()
            target = torch.tensor(completion)[:, None]
            found.append(logits.log_softmax(-1).gather(1, target)[:, 0])
    return torch.cat(found)


def padded(model: Any) -> torch.Tensor:
    """The same by one batch a prompt, padded on the right: the model's own noise."""
    found = []
    for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True):
        longest = max(map(len, group))
        rows = [prompt + c + c[-1:] * (longest - len(c)) for c in group]
        mask = [[1] * (len(prompt) + len(c)) + [0] * (longest - len(c)) for c in group]
        logits = model(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask)).logits
        for row, completion in zip(logits.double(), group, strict=True):
            own = row[len(prompt) - 1 :][: len(completion)].log_softmax(-1)
            found.append(own.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


def wide(model: Any) -> Any:
    """A copy in fp64; grouped products of experts have none."""
    copied = copy.deepcopy(model).double()
    copied.config._experts_implementation = "eager"
    copied.config.get_text_config()._experts_implementation = "eager"
    return copied


def recomputed(model: Any, prompt: list[int]) -> list[int]:
    """Greedy tokens without any cache."""
    row = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row]), use_cache=False).logits
        row.append(int(logits[0, -1].argmax()))
    return row[len(prompt) :]


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


if __name__ == "__main__":
    raise SystemExit(main())
