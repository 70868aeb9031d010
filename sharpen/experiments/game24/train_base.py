"""Train the base model that ships with the package, from nothing but arithmetic.

    python -m sharpen.experiments.game24.train_base --out DIR [--steps 3000] [--threads 1]

Each batch mixes solutions of the 800 base-training puzzles with random problems: four numbers in
1..13 and another target in 1..100, uniform over the targets they can make. No target is 24 there,
so no puzzle of the sharpening or test split is ever seen. Only completion tokens carry loss. The
tokenizer has one token per number 0..200, operator, word and newline. Writes config.json,
model.safetensors, tokenizer.json, training.json and a model card with the settings, the hardware,
the wall time and the metrics on the sharpening split (the test split is left for the user to
measure). The card alone is written again, from what training.json recorded, by

    python -m sharpen.experiments.game24.train_base --card DIR
"""

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sharpen.records import write_text
from sharpen.tasks.game24.puzzles import (
    MAX_NUMBER,
    SPLIT_SIZES,
    TARGET,
    Numbers,
    Step,
    integer_solutions,
    other_targets,
    random_numbers,
    split_puzzles,
)
from sharpen.tasks.game24.traces import is_solution, prompt_text, trace_text

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
WORDS = ["\n", "Numbers:", "Target:", "left:", "+", "-", "*", "/", "="]
MAX_LENGTH = 1024


class SpecialIds(NamedTuple):
    """Ids of the special tokens that a model's configuration names."""

    pad: int
    bos: int
    eos: int


def special_ids(tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
    """The special ids of a tokenizer made by `build_tokenizer`."""
    vocab = tokenizer.get_vocab()
    return SpecialIds(*(vocab[SPECIAL[f"{name}_token"]] for name in SpecialIds._fields))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that decodes a trace to exactly the text it was encoded from."""
    words = [*SPECIAL.values(), *WORDS, *map(str, range(MAX_NUMBER + 1))]
    vocab = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    # tokens are joined by spaces, then the spaces around a newline are taken away again
    core.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\x00", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(" ?\n ?"), "\n"),
        ]
    )
    bos = SPECIAL["bos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


IGNORED = -100
Problem = tuple[Numbers, int, tuple[Step, ...]]


def train(args: argparse.Namespace) -> None:
    """Run the recipe and write the model folder."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    puzzles = [p for p in split_puzzles("base") if integer_solutions(p)]
    held_out = split_puzzles("sharpen")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay
    )
    started = time.monotonic()
    loss = torch.zeros(())
    bar = tqdm(range(args.steps), desc="train", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        n_base = int(args.batch * args.base_share)
        problems = [base_problem(rng, puzzles) for _ in range(n_base)]
        problems += [random_problem(rng) for _ in range(args.batch - n_base)]
        loss = completion_loss(model, *encode(problems, tokenizer))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % args.eval_every == 0:
            greedy = accuracy(model, tokenizer, held_out, sample=False)
            once = accuracy(model, tokenizer, held_out, sample=True)
            tqdm.write(
                f"step {step + 1}: loss {loss.item():.4f} greedy {greedy:.3f} T=1 {once:.3f}"
            )
    seconds = time.monotonic() - started
    metrics = {
        "final_batch_loss_nats": round(loss.item(), 4),
        "base_greedy": accuracy(model, tokenizer, puzzles, sample=False),
        "sharpen_greedy": accuracy(model, tokenizer, held_out, sample=False),
        "sharpen_sample": accuracy(model, tokenizer, held_out, sample=True),
    }
    save(Path(args.out), model, tokenizer)
    record = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "card")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "machine": f"{platform.machine()}, {args.threads} thread(s), torch {torch.__version__}",
        "base_puzzles": len(puzzles),
        "metrics": metrics,
    }
    text = json.dumps(record, indent=2) + "\n"
    (Path(args.out) / "training.json").write_text(text)
    write_card(Path(args.out))
    sys.stdout.write(text)


def random_problem(rng: random.Random) -> Problem:
    """Four random numbers, a random target in 1..100 but 24, and a random solution.

    Uniform over targets, so that hard ones come as often as those that many steps lead to.
    """
    while True:
        numbers = random_numbers(rng)
        targets = other_targets(numbers)
        if targets:
            target = rng.choice(targets)
            return numbers, target, rng.choice(integer_solutions(numbers, target))


def base_problem(rng: random.Random, puzzles: list[Numbers]) -> Problem:
    """A random solution of a random base-training puzzle."""
    numbers = rng.choice(puzzles)
    return numbers, TARGET, rng.choice(integer_solutions(numbers))


def encode(problems: list[Problem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, L], right-padded; labels only on the completion and its end."""
    prompts = [prompt_text(numbers, target) for numbers, target, _ in problems]
    traces = [trace_text(numbers, steps) for numbers, _, steps in problems]
    prompt_ids = tokenizer(prompts)["input_ids"]
    trace_ids = tokenizer(traces, add_special_tokens=False)["input_ids"]
    special = special_ids(tokenizer)
    rows = [p + t + [special.eos] for p, t in zip(prompt_ids, trace_ids, strict=True)]
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), special.pad)
    labels = torch.full((len(rows), length), IGNORED)
    for i, (row, prompt) in enumerate(zip(rows, prompt_ids, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(prompt) : len(row)] = torch.tensor(row[len(prompt) :])
    return ids, labels


def completion_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens that carry a label, nats."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    keep = labels[:, 1:] != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[keep]), labels[:, 1:][keep])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh 0.9 M-parameter Llama."""
    special = special_ids(tokenizer)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=special.pad,
        bos_token_id=special.bos,
        eos_token_id=special.eos,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 100 steps, then a cosine to a fiftieth of the peak."""
    warm = min(1.0, (step + 1) / 100)
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    puzzles: Sequence[Numbers],
    sample: bool,
) -> float:
    """Share of `puzzles` solved by greedy decoding, or by one sample at temperature 1."""
    model.eval()
    ids = torch.tensor(tokenizer([prompt_text(p) for p in puzzles])["input_ids"])
    # pyright cannot see through the decorators of `generate`
    out = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=sample,
        top_k=0,
        max_new_tokens=40,
    )
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    model.train()
    return sum(map(is_solution, texts, puzzles)) / len(puzzles)


def save(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write weights, tokenizer and generation defaults."""
    out.mkdir(parents=True, exist_ok=True)
    special = special_ids(tokenizer)
    model.generation_config = GenerationConfig(
        pad_token_id=special.pad, bos_token_id=special.bos, eos_token_id=special.eos
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [game-of-24, sharpen]
---
# Game of 24, base model

A Llama of {parameters:,} parameters (hidden 128, 4 layers, 4 heads, feed-forward 384, tied
embeddings) with one token per number 0..200 and per operator. It writes step-by-step solutions of
Game of 24. It ships with `sharpen` as the base model of its demonstration and tests, and is good
for nothing else.

```text
{example}
```

## Training
From nothing, on {examples:,} sequences made on the fly; no data set was read.
- {base_percent:.0f} % of each batch: solutions of the {n_base} base-training puzzles that have one
  within the integers 0..200, uniform over puzzles, then over solutions.
- The rest: four numbers in 1..13 and another target in 1..100, uniform over the targets they can
  make, then over solutions.
- The {n_sharpen} puzzles of the sharpening split and the {n_test} of the test split were never
  seen: no other problem has the target 24.
- Loss on completion tokens only. AdamW, betas 0.9 and 0.98, weight decay {weight_decay}, peak
  learning rate {lr}, 100 steps of warm-up, cosine; {steps:,} steps of {batch} sequences; gradient
  norm clipped at 1; fp32; seed {seed}.
- {machine}; {minutes:.0f} minutes of wall time on a shared machine.

```bash
python -m sharpen.experiments.game24.train_base --out DIR {command}
```

## Metrics
| figure | value |
|---|---|
| loss of the last batch, nats per token | {final_batch_loss_nats} |
| base-training puzzles, greedy | {base_greedy:.1%} |
| sharpening split, greedy | {sharpen_greedy:.1%} |
| sharpening split, one sample at T=1 | {sharpen_sample:.1%} |

Figures on the test split: `make demo`.

## Limits
Only integers 0..200 can be written, so 16 of the 1362 puzzles, which need fractions or larger
numbers, cannot be solved.
"""

EXAMPLE = """Numbers: 4 4 6 8 Target: 24
8 + 4 = 12 left: 4 6 12
6 - 4 = 2 left: 2 12
12 * 2 = 24"""


# Any: what json.loads returns
def model_card(card: dict[str, Any]) -> str:
    """The text of the card from the content of `training.json`."""
    settings, metrics = card["settings"], card["metrics"]
    flags = ("steps", "batch", "base_share", "lr", "weight_decay", "seed", "threads")
    return CARD.format(
        example=EXAMPLE,
        parameters=card["parameters"],
        examples=settings["steps"] * settings["batch"],
        base_percent=100 * settings["base_share"],
        n_base=card["base_puzzles"],
        n_sharpen=SPLIT_SIZES["sharpen"],
        n_test=SPLIT_SIZES["test"],
        minutes=card["seconds"] / 60,
        machine=card["machine"],
        command=" ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in flags),
        **{key: settings[key] for key in ("weight_decay", "lr", "steps", "batch", "seed")},
        **metrics,
    )


def write_card(folder: Path) -> None:
    """Write README.md beside the weights from training.json."""
    card = json.loads((folder / "training.json").read_text())
    write_text(folder / "README.md", model_card(card))


def main() -> None:
    """Parse the flags; train, or write a card again."""
    parser = argparse.ArgumentParser(description="Train the base model that ships with sharpen.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="DIR", help="folder to write the trained model to")
    where.add_argument("--card", metavar="DIR", help="only write the card of a trained model again")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--base-share", type=float, default=0.25)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-every", type=int, default=250)
    args = parser.parse_args()
    if args.card is not None:
        write_card(Path(args.card))
    else:
        train(args)


if __name__ == "__main__":
    main()
