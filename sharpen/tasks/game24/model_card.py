"""The model card beside the weights, written from what the training run recorded.

python -m sharpen.tasks.game24.model_card DIR      # DIR holds training.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from sharpen.records import write_text

from .puzzles import SPLIT_SIZES

# Any: what json.loads returns
Card = dict[str, Any]

TEXT = """---
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
python -m sharpen.tasks.game24.train_base --out DIR {command}
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


def model_card(card: Card) -> str:
    """The text of the card from the content of `training.json`."""
    settings, metrics = card["settings"], card["metrics"]
    flags = ("steps", "batch", "base_share", "lr", "weight_decay", "seed", "threads")
    return TEXT.format(
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
    """Write README.md from training.json."""
    card = json.loads((folder / "training.json").read_text())
    write_text(folder / "README.md", model_card(card))


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
