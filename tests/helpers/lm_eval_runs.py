"""One run of lm-evaluation-harness on local tasks, and what two runs must agree on.

Imports the harness: for tests/hosts alone.
"""

from functools import cache
from pathlib import Path

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from helpers.byte_checkpoint import byte_checkpoint, byte_tokenizer
from helpers.lm_eval_tasks import prose, write_tasks
from sharpen.integrations.lm_eval import register

CONTEXT = 512
TASKS = ["shared", "two", "cut", "nothing", "rolling", "last", "write"]


def prepared(folder: Path) -> tuple[Path, Path]:
    """A checkpoint, and tasks of which half of "last" are what the model writes greedily."""
    model = byte_checkpoint(folder / "model", max_position_embeddings=CONTEXT)
    lm = model_of("hf", model)
    # of what a random model writes, few bytes are text: those are asked for that are
    last = []
    for i in range(200):
        context = prose(24, i)
        row = torch.tensor([byte_tokenizer()(context)["input_ids"]])
        written = byte_tokenizer().decode(lm.model(row).logits[0, -1].argmax())
        if written.isascii() and written.isprintable() and written.strip():
            last.append({"context": context, "target": written})
        if len(last) == 3:
            break
    assert len(last) == 3
    # the first token of these is greedy, and the next is not
    last += [{"context": row["context"], "target": row["target"] + "q"} for row in last]
    return model, write_tasks(folder / "tasks", last)


def model_of(kind: str, path: Path, **options):
    """A model of the harness on the CPU."""
    register()
    return get_model(kind)(pretrained=str(path), **{"device": "cpu", "batch_size": 4} | options)


@cache
def manager(folder: Path) -> TaskManager:
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluated(lm, folder: Path, tasks=TASKS, **options):
    """Results and samples of `tasks` under a model, or the name of a model type."""
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager(folder),
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )


def numbers(found, task: str) -> list:
    """What the model answered to every request of a task, in order; a rank may repeat its last."""
    rows = sorted(found["samples"][task], key=lambda row: row["doc_id"])
    return [answer for row in rows for answer, *_ in row["resps"]]


def assert_same(found, wanted, task: str, within: float = 1e-5):
    """Same answers and metrics, numbers within `within` nats, or of a large sum that share."""
    answers = list(zip(numbers(found, task), numbers(wanted, task), strict=True))
    assert answers
    for got, want in answers:
        if isinstance(want, str):
            assert got == want
            continue
        (got, *greedy), (want, *wanted_greedy) = (
            x if isinstance(x, tuple) else (x,) for x in (got, want)
        )
        assert abs(got - want) <= within * max(1.0, abs(want)), task
        assert greedy == wanted_greedy
    got, want = (
        {k: v for k, v in x["results"][task].items() if k.endswith(",none") and "stderr" not in k}
        for x in (found, wanted)
    )
    assert got.keys() == want.keys()
    for name, value in want.items():
        exact = 0.0 if "perplexity" not in name else 1e-5 * value
        assert abs(got[name] - value) <= exact, (task, name)


def request(kind: str, *arguments, task: str = "t", doc: int = 0) -> Instance:
    """A request as a task builds it."""
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=(task, doc, 1))


def loglikelihoods(lm, pairs) -> list[tuple[float, bool]]:
    """`lm.loglikelihood` of (context, continuation)."""
    return lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
