"""The model type `sharpen` beside lm-evaluation-harness's own `hf`, on many-choice tasks.

    python -m bench.lm_eval_tasks                             # every task, in an environment with
    python -m bench.lm_eval_tasks --threads 1 --out FILE.jsonl              # sharpen[lm-eval]
    python -m bench.lm_eval_tasks --check                     # tiny shapes, agreement alone

`loglikelihood` from text to answers, of a random Llama of 4 layers x 256, V = 8192, fp32,
a token a character. "choices": contexts of 600 tokens, 8 choices of 24 each. "shots": 600 tokens of
worked examples before 16 questions of 40 tokens, 4 choices of 8 each. Batches hold as many tokens:
those of 8 sequences of `hf`, and as large a budget of ours.
"""

import functools
import logging
import random
import string
import sys
from typing import Any, NamedTuple

import torch
import transformers

from bench._measure import (
    Row,
    Subject,
    Timing,
    flags,
    kind_of,
    machine,
    measure,
    parsed,
    speedup,
    steps,
    table,
    write,
)
from bench._sharing import D, V, llama
from sharpen.errors import InputError
from sharpen.integrations.lm_eval import register

BATCH = 8
TOLERANCE = 1e-5  # nats a token, of the sums over a choice


class Task(NamedTuple):
    """Questions after a preamble of `shots` tokens, each with choices; sizes in tokens."""

    name: str
    shots: int
    questions: int
    context: int
    choices: int
    C: int

    def __str__(self) -> str:
        sizes = f"questions={self.questions} context={self.context} choices={self.choices}"
        return f"shots={self.shots} {sizes} C={self.C}"

    @property
    def max_tokens(self) -> int:
        """What `hf` reads in one batch."""
        return BATCH * (self.shots + self.context + self.C - 1)

    @property
    def flops(self) -> float:
        """Forward, of the layers on every token once and of the head on those that predict."""
        ends = self.choices * (self.C - 1)
        tokens = self.shots + self.questions * (self.context + ends)
        return 2.0 * (_layer_parameters() * tokens + D * V * self.questions * (1 + ends))

    def pairs(self) -> list[tuple[str, str]]:
        """Context and continuation of every request."""
        draw = random.Random(0)

        def text(n: int) -> str:
            return "".join(draw.choices(string.ascii_letters, k=n))

        shots = text(self.shots)
        contexts = [shots + text(self.context) for _ in range(self.questions)]
        return [(context, text(self.C)) for context in contexts for _ in range(self.choices)]


TASKS = [Task("choices", 0, 8, 600, 8, 24), Task("shots", 600, 16, 40, 4, 8)]
CHECKED = [Task("choices", 0, 2, 20, 3, 4), Task("shots", 20, 3, 5, 2, 2)]


def main() -> int:
    """Parse the flags and measure."""
    parser = flags("lm-eval's many-choice tasks, ours beside hf", seconds=20.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parsed(parser)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        register()
    except InputError as error:
        print(f"missing, {error}")
        return 0 if args.check else 2
    for task in steps(CHECKED if args.check else TASKS):
        rows, timings = measured(task, args.device, 0.0 if args.check else args.seconds)
        ratio = speedup(timings["ours"], timings["hf"])
        print(f"{table(f'lm-eval {task.name}, {task}', rows, {})}\n  ours: {ratio:.2f} x hf")
        if args.out:
            write(rows, args.out)
    return 0


def measured(task: Task, device: str, seconds: float) -> tuple[list[Row], dict[str, Timing]]:
    """Rows and timings; a RuntimeError if the answers differ."""
    # the harness's own classes
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import get_model  # pyright: ignore[reportMissingImports]

    asked = [Instance("loglikelihood", {}, pair, 0) for pair in task.pairs()]

    def answers(lm: Any) -> torch.Tensor:
        found = lm.loglikelihood(asked, disable_tqdm=True)
        return torch.tensor([x for x, _ in found], dtype=torch.float64) / task.C

    made = functools.partial(dict, tokenizer=tokenizer(), device=device, batch_size=BATCH)
    ways = {
        "ours": get_model("sharpen")(llama().to(device), **made(max_tokens=task.max_tokens)),
        "ours, sharing=none": get_model("sharpen")(
            llama().to(device), **made(max_tokens=task.max_tokens, sharing="none")
        ),
        "hf": get_model("hf")(llama().to(device), **made()),
    }
    truth = answers(ways["hf"])
    errors = {name: (answers(lm) - truth).abs().max().item() for name, lm in ways.items()}
    timings, failed = measure(
        {name: functools.partial(answers, lm) for name, lm in ways.items()}, device, seconds
    )
    if failed or max(errors.values()) > TOLERANCE:
        raise RuntimeError(f"a contender failed or differs: {failed} {errors}")
    subject = Subject(f"lm-eval {task.name}", str(task), "float32", task.flops, machine(device))
    rows = [
        Row.of(subject, name, kind_of(name), timing, errors[name])
        for name, timing in timings.items()
    ]
    return rows, timings


@functools.cache
def _layer_parameters() -> int:
    return sum(p.numel() for p in llama().model.layers.parameters())


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token a letter."""
    from tokenizers import Tokenizer, models

    names = ["<pad>", "<s>", "</s>", *string.ascii_letters]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


if __name__ == "__main__":
    sys.exit(main())
