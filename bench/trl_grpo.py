"""The log-prob phase of GRPO: TRL's trainer beside ours, by the method that both train with.

    python -m bench.trl_grpo --threads 1 --out FILE.jsonl          # in .venv-hosts, which has TRL
    python -m bench.trl_grpo --device cuda --dtype bfloat16 --shape 2048 256 16
    python -m bench.trl_grpo --check      # tiny, agreement alone; without TRL, beside its logits

One prompt of P tokens and N completions of C, the random Llama of `bench.sharing`. Log-probs and
entropies, as every step of GRPO takes them: `forward` without gradients, as of old and reference
policies, `forward+backward` with those of the log-probs' sum. No gradient checkpointing.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench._measure import (
    Row,
    Subject,
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
from bench._sharing import (
    Problem,
    by_padded_batch,
    check_gradients,
    errors,
    gradients,
    llama,
)
from sharpen.integrations.trl.shared_stats import SharedStats
from sharpen.models import load_tokenizer

WHATS = ("forward", "forward+backward")
OURS, THEIRS = "ours", "TRL"
Way = tuple[Any, Callable[[], Tensor]]


def main() -> None:
    """Parse the flags; check or measure."""
    parser = flags("the log-prob phase of GRPO, TRL's and ours", seconds=10.0)
    parser.add_argument("--what", choices=WHATS)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("P", "C", "N"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parsed(parser)
    problem = Problem(*(args.shape or ((20, 5, 4) if args.check else (512, 64, 16))))
    for what in steps(WHATS if args.what is None else (args.what,)):
        rows = run(what, problem, args)
        print(table(f"GRPO log-probs {what}, {problem}, {args.dtype}, {args.device}", rows, {}))
        if args.out:
            write(rows, args.out)


def run(what: str, problem: Problem, args: argparse.Namespace) -> list[Row]:
    """Measure both in turns, after they agreed; a RuntimeError if they do not."""
    dtype = getattr(torch, args.dtype)
    last: dict[str, Tensor] = {}
    found: dict[str, Any] = {}
    contenders = ways(problem, args.device, dtype)

    def call(name: str) -> Tensor:
        model, way = contenders[name]
        with torch.set_grad_enabled(what != "forward"):
            last[name] = way()
        if what != "forward":
            model.zero_grad()
            last[name].sum().backward()
        last[name] = last[name].detach()
        return last[name]

    for name, (model, _) in contenders.items():
        call(name)
        found[name] = gradients(model)
    off = {}
    # in half precision both round as they may; fp32 is judged
    if dtype == torch.float32:
        off = errors(problem, {name: x.cpu() for name, x in last.items()})
        if what != "forward":
            print(f"gradients differ by {check_gradients(found):.0e} of the largest")
    calls = {name: lambda name=name: call(name) for name in contenders}
    timings, failed = measure(calls, args.device, 0.0 if args.check else args.seconds)
    if failed:
        raise RuntimeError(f"a contender failed: {failed}")
    (peer,) = (timing for name, timing in timings.items() if name != OURS)
    print(f"round by round, ours is {speedup(timings[OURS], peer):.2f} times as fast")
    flops = problem.flops * (3 if "backward" in what else 1)
    op = f"GRPO log-probs {what}"
    subject = Subject(op, str(problem), args.dtype, flops, machine(args.device))
    return [
        Row.of(subject, name, kind_of(name), timing, off.get(name))
        for name, timing in timings.items()
    ]


def trainer_of(trainer_class: Any, problem: Problem, device: str, dtype: torch.dtype) -> Any:
    """A trainer of the Llama, that is never trained."""
    data = importlib.import_module("datasets").Dataset.from_list([{"prompt": "1"}])
    args = importlib.import_module("trl").GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        report_to="none",
        use_cpu=device == "cpu",
        bf16=False,
        per_device_train_batch_size=problem.N,
        num_generations=problem.N,
        disable_tqdm=True,
    )
    return trainer_class(
        model=llama().to(device, dtype),
        args=args,
        train_dataset=data,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        processing_class=load_tokenizer("game24"),
    )


def ways(problem: Problem, device: str, dtype: torch.dtype) -> dict[str, Way]:
    """The model of each contender, and its log-probs [N x C]."""
    prompt, completions = (x.to(device) for x in problem.ids())
    ids = torch.cat([prompt.expand(problem.N, -1), completions], dim=1)
    mask = torch.ones_like(ids)
    if importlib.util.find_spec("trl") is None:
        print("without TRL, beside its logits alone")
        labels = ids.clone()
        labels[:, : problem.P] = -100
        own, plain = llama().to(device, dtype), llama().to(device, dtype)
        stats = SharedStats(own, outputs=("entropy",))
        return {
            OURS: (own, lambda: stats(ids, mask, labels)["log_probs"][:, -problem.C :].flatten()),
            "padded batch": (plain, lambda: by_padded_batch(plain, prompt, completions)),
        }
    found: dict[str, Way] = {}
    ours = importlib.import_module("sharpen.integrations.trl").SharedPrefixGRPOTrainer
    for name, kind in ((OURS, ours), (THEIRS, importlib.import_module("trl").GRPOTrainer)):
        trainer = trainer_of(kind, problem, device, dtype)

        def call(trainer: Any = trainer) -> Tensor:
            batch = trainer.model, ids, mask, problem.C
            method = trainer._get_per_token_logps_and_entropies
            return method(*batch, compute_entropy=True)[0].flatten()

        found[name] = trainer.model, call
    return found


if __name__ == "__main__":
    main()
