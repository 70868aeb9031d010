"""What a shared prompt saves on random models of real shapes, in bf16 on a GPU.

    python -m bench.sharing_gpu                                     # every task
    python -m bench.sharing_gpu --what forward --model Llama-3.1-8B --out FILE.jsonl
    python -m bench.sharing_gpu --check                             # tiny, fp32, agreement alone

Scoring and a training step (forward and backward) beside whole sequences in batches that fit,
which take PyTorch's flash attention, and beside a DynamicCache of the prompt that is repeated for
a part of its completions at a time. Sampling beside `generate` on N copies of the prompt. The
saving in tokens is N (P + C) over P + N C. The models are made on the device; nothing is read.

In reading order: the models and what their completions cost; tasks and the command; log-probs and
gradients as a GPU can hold them; sampling; rows and text.
P prompt tokens, C tokens of a completion, N completions.
"""

import argparse
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

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
from bench._sharing import by_padded_batch, check_gradients, gathered, gradients
from bench.peers.finding import Missing, reason
from sharpen import Scorer
from sharpen.sampling import SamplingConfig
from sharpen.sampling.base import Prompt
from sharpen.sampling.hf import TransformersSampler

What = Literal["forward", "forward+backward", "sampling"]
PADDED, CACHED, ALONE = "padded batch", "DynamicCache", "ours, no sharing"
GENERATE = "generate"
REFERENCES = (PADDED, GENERATE)  # whole sequences
MIN_ROUNDS = 3  # a padded batch of the larger model takes seconds
TRUE_ROWS = 2  # completions that are scored in fp32
TOLERANCE_NATS = 1e-3  # of fp32; chosen
SMALL, LARGE = "Qwen2.5-0.5B", "Llama-3.1-8B"
Calls = dict[str, Callable[[], Tensor]]
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 211,
        "tie_word_embeddings": True,
    },
}


@functools.cache
def model_of(name: str, device: str, dtype: torch.dtype) -> Any:
    """In eval mode; logits of standard deviation 3; nothing ends a sequence."""
    sizes = dict(SHAPES[name])
    no_ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(
        sizes.pop("model_type"), max_position_embeddings=32_768, **sizes, **no_ids
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    nn.init.normal_(model.lm_head.weight, std=3 / sizes["hidden_size"] ** 0.5)
    return model


def twin(model: Any) -> Any:
    """Another model of the very same parameters: ours has hooks that a peer must not meet."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@dataclasses.dataclass(frozen=True)
class Prompted:
    """N completions of C tokens of one prompt of P tokens, under the model called `name`."""

    name: str
    P: int
    C: int
    N: int

    def __str__(self) -> str:
        return f"{self.name} P={self.P} C={self.C} N={self.N}"

    def ids(self, device: str) -> tuple[Tensor, Tensor]:
        """The prompt [P] and its completions [N, C]."""
        generator = torch.Generator().manual_seed(1)
        V = SHAPES[self.name]["vocab_size"]
        prompt = torch.randint(V, (self.P,), generator=generator)
        completions = torch.randint(V, (self.N, self.C), generator=generator)
        return prompt.to(device), completions.to(device)

    def tokens(self, *, shared: bool) -> int:
        """That the layers see."""
        once = self.P if shared else self.N * self.P
        return once + self.N * self.C

    def flops(self, *, shared: bool) -> float:
        """Forward: layers on every token, attention on every pair, the head on what predicts."""
        sizes = SHAPES[self.name]
        D, L, H = (sizes[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        kv = D // H * sizes["num_key_value_heads"]
        layer = 2 * D * D + 2 * D * kv + 3 * D * sizes["intermediate_size"]
        own = self.N * self.C * (self.C + 1) / 2 + self.N * self.C * self.P
        pairs = own + self.P * (self.P + 1) / 2 * (1 if shared else self.N)
        layers = L * (2 * layer * self.tokens(shared=shared) + 4 * D * pairs)
        return layers + 2 * D * sizes["vocab_size"] * self.N * self.C


class Setting(NamedTuple):
    """A task's ids and models, and how many tokens a part of a batch may have."""

    problem: Prompted
    prompt: Tensor
    completions: Tensor
    ours: Any
    plain: Any
    part: int

    @property
    def lists(self) -> tuple[list[list[int]], list[list[list[int]]]]:
        """As a scorer takes them."""
        return [self.prompt.tolist()], [self.completions.tolist()]

    @property
    def rows(self) -> int:
        """Whole sequences of a part."""
        return max(1, self.part // (self.problem.P + self.problem.C))


def setting(problem: Prompted, device: str, dtype: torch.dtype, part: int) -> Setting:
    """The task on a device."""
    model = model_of(problem.name, device, dtype)
    return Setting(problem, *problem.ids(device), twin(model), model, part)


class Errors(NamedTuple):
    """Of log-probs, nats."""

    mean: float
    most: float


class Found(NamedTuple):
    """What came of one task."""

    timings: dict[str, Timing]
    missing: Missing
    errors: dict[str, Errors]
    returned: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class SharingGpuRow(Row):
    """A row; its errors are nats against the model in fp32, of some completions."""

    tokens: int = 0  # that the layers see in one call
    mean_error: float | None = None
    speedup: float | None = None  # over whole sequences: the median over rounds
    of_tokens: float | None = None  # that, of the saving in tokens
    of_operations: float | None = None  # and of the saving in operations, the head's among them


@dataclasses.dataclass(frozen=True)
class Task:
    """One group of contenders."""

    what: What
    problem: Prompted
    part: int  # tokens that whole sequences go in
    temperature: float = 1.0
    alone: bool = True  # ours without sharing takes part: as long as a padded batch

    def __str__(self) -> str:
        return f"sharing {self.what}, {self.problem}"

    def run(self, device: str, dtype: torch.dtype, seconds: float) -> Found:
        """Measure the contenders; one that fails is named."""
        at = setting(self.problem, device, dtype, self.part)
        if self.what == "sampling":
            calls = sampling_calls(at, self.temperature)
        else:
            calls = forward_calls(at) if self.what == "forward" else backward_calls(at)
            if not self.alone:
                calls.pop(ALONE, None)
        last: dict[str, Tensor] = {}

        def call(name: str) -> Tensor:
            last[name] = calls[name]()
            return last[name]

        kept: Calls = {name: lambda name=name: call(name) for name in calls}
        timings, missing = measure(kept, device, seconds, MIN_ROUNDS)
        last = {name: last[name].detach().cpu() for name in timings}
        at.plain.zero_grad()
        if self.what == "sampling":
            return Found(timings, missing, {}, last)
        rows, want = _truth(at)
        found = {name: x.view(self.problem.N, -1)[rows] for name, x in last.items()}
        return Found(timings, missing, {n: _errors(x, want) for n, x in found.items()}, last)

    def gradient_error(self, device: str, dtype: torch.dtype) -> float:
        """How far the contenders' gradients are apart, of the largest.

        Raises:
            RuntimeError: If one is off.
        """
        at = setting(self.problem, device, dtype, self.part)
        found = {}
        for name, call in backward_calls(at).items():
            call()
            # the models share their parameters, and so their gradients
            found[name] = gradients(at.plain)
        at.plain.zero_grad()
        return check_gradients(found)


def _truth(at: Setting) -> tuple[Tensor, Tensor]:
    """Some completions, and their log-probs [rows, C] by the model in fp32, on the CPU."""
    rows = torch.linspace(0, at.problem.N - 1, min(at.problem.N, TRUE_ROWS)).long()
    wide = copy.deepcopy(at.plain).float()
    with torch.no_grad():
        found = [by_padded_batch(wide, at.prompt, at.completions[row][None]) for row in rows]
    return rows, torch.stack(found).cpu()


def _errors(got: Tensor, want: Tensor) -> Errors:
    off = (got.float() - want).abs()
    return Errors(off.mean().item(), off.max().item())


# the most telling first, for a run that is cut short
TASKS = [
    Task("forward", Prompted(SMALL, 2048, 256, 64), 2**15),
    Task("forward", Prompted(LARGE, 2048, 256, 64), 2**15, alone=False),
    Task("forward+backward", Prompted(SMALL, 2048, 256, 64), 2**14),
    # each token is a step, whatever its row: fewer of them say the same
    Task("sampling", Prompted(SMALL, 2048, 64, 64), 2**15),
    Task("sampling", Prompted(LARGE, 2048, 32, 64), 2**15),
]
CHECKED = [
    Task("forward", Prompted("tiny", 40, 6, 5), 92),
    Task("forward+backward", Prompted("tiny", 40, 6, 5), 92),
    Task("sampling", Prompted("tiny", 40, 6, 5), 92, temperature=0.0),
]


def main() -> None:
    """Parse the flags; check or measure."""
    parser = flags("what sharing a prompt saves on a GPU", seconds=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--what", choices=sorted({task.what for task in TASKS}))
    parser.add_argument("--model", choices=SHAPES, help="tasks of one model")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("P", "C", "N"), help="instead")
    args = parsed(parser)
    transformers.logging.disable_progress_bar()
    if args.check:
        check(args.device)
        return
    for task in steps(chosen(args)):
        try:
            rows = measured(task, args.device, args.dtype, args.seconds)
        # a model that does not fit is no reason to lose the other tasks
        except Exception as error:
            print(f"{task}: {reason(error)}", flush=True)
            continue
        if args.out:
            write(rows, args.out)


def chosen(args: argparse.Namespace) -> list[Task]:
    """The tasks that the flags name; of a shape or model of their own, where one is given."""
    tasks = [task for task in TASKS if args.what in (None, task.what)]
    if args.shape:
        problem = Prompted(args.model or SMALL, *args.shape)
        # the first task of each kind
        kinds = {task.what: task for task in reversed(tasks)}
        return [dataclasses.replace(task, problem=problem) for task in kinds.values()]
    return [task for task in tasks if args.model in (None, task.problem.name)]


def measured(task: Task, device: str, dtype: str, seconds: float) -> list[SharingGpuRow]:
    """Rows of one task; prints its table."""
    found = task.run(device, getattr(torch, dtype), seconds)
    rows = rows_of(task, found, device, dtype)
    print(text_of(task, rows, found.missing), flush=True)
    return rows


def check(device: str) -> None:
    """Every contender runs tiny in fp32, and agrees: log-probs, gradients, greedy samples."""
    for task in steps(CHECKED):
        found = task.run(device, torch.float32, 0.0)
        assert not found.missing, found.missing
        print(text_of(task, rows_of(task, found, device, "float32"), found.missing))
        assert all(error.most <= TOLERANCE_NATS for error in found.errors.values()), found.errors
        if task.what == "sampling":
            first, *others = found.returned.values()
            assert all(torch.equal(first, other) for other in others), found.returned
        else:
            assert len(found.errors) == len(found.timings)
        if task.what == "forward+backward":
            print(f"  gradients: {task.gradient_error(device, torch.float32):.0e} of the largest")


def by_padded_parts(model: Any, prompt: Tensor, completions: Tensor, rows: int) -> Tensor:
    """Log-probs [N x C] of whole sequences, so many rows at a time."""
    return torch.cat([by_padded_batch(model, prompt, part) for part in completions.split(rows)])


def by_cache_parts(model: Any, prompt: Tensor, completions: Tensor, rows: int) -> Tensor:
    """The same from a cache of the prompt, repeated for so many rows at a time."""
    first = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
    found = []
    for part in completions.split(rows):
        cache = DynamicCache()
        for i, layer in enumerate(first.past_key_values.layers):
            repeated = (x.repeat_interleave(len(part), dim=0) for x in (layer.keys, layer.values))
            cache.update(*repeated, i)
        rest = model(input_ids=part[:, :-1], past_key_values=cache, use_cache=True).logits
        opening = first.logits.expand(len(part), 1, -1)
        found.append(gathered(torch.cat([opening, rest], dim=1), part))
    return torch.cat(found)


def forward_calls(at: Setting) -> Calls:
    """Log-probs [N x C] by each way, without gradients."""
    scorer = Scorer(at.ours, sharing="tree", max_tokens=2**17)
    alone = Scorer(at.ours, sharing="none", max_tokens=at.part)
    # the cached rows' logits are wider than their keys: as many as a padded part has
    own = at.prompt, at.completions, at.rows
    calls: Calls = {
        "ours": functools.partial(scorer.logprobs, *at.lists),
        ALONE: functools.partial(alone.logprobs, *at.lists),
        PADDED: functools.partial(by_padded_parts, at.plain, *own),
        CACHED: functools.partial(by_cache_parts, at.plain, *own),
    }
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def backward_calls(at: Setting) -> Calls:
    """Log-probs, and the gradients of their sum in every parameter, which stay."""
    scorer = Scorer(at.ours, sharing="tree", max_tokens=2**17)
    bounded = Scorer(at.ours, max_tokens=at.part)
    slopes = torch.ones(at.completions.numel(), device=at.completions.device)

    def ours() -> Tensor:
        at.ours.zero_grad()
        found = scorer.logprobs(*at.lists)
        found.sum().backward()
        return found.detach()

    def in_parts() -> Tensor:
        at.ours.zero_grad()
        return bounded.backward(*at.lists, slopes)

    def padded() -> Tensor:
        at.plain.zero_grad()
        found = []
        for part in at.completions.split(at.rows):
            one = by_padded_batch(at.plain, at.prompt, part)
            one.sum().backward()
            found.append(one.detach())
        return torch.cat(found)

    return {"ours": ours, "ours, bounded": in_parts, PADDED: padded}


class _Words:
    """What a sampler asks of a tokenizer."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: object) -> str:
        """Numbers, as words."""
        return " ".join(map(str, ids))


def sampling_calls(at: Setting, temperature: float) -> Calls:
    """Ids [N x C] that each draws."""
    N, C = at.problem.N, at.problem.C
    tokenizer: Any = _Words()
    sampler = TransformersSampler(at.ours, tokenizer, max_tokens=2**20, sharing="shared")
    prompts = [Prompt("0", "", tuple(at.prompt.tolist()), "bench")]
    config = SamplingConfig(n=N, max_new_tokens=C, temperature=temperature)

    def ours() -> Tensor:
        ((samples,),) = sampler.sample(prompts, config)
        return torch.tensor(samples.completion_ids).flatten()

    def generate() -> Tensor:
        ids = at.prompt.expand(N, -1)
        options = {"do_sample": True, "top_k": 0} if temperature else {"do_sample": False}
        mask = torch.ones_like(ids)
        found = at.plain.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=C, pad_token_id=0, **options
        )
        return found[:, len(at.prompt) :].flatten()

    return {"ours": ours, GENERATE: generate}


def rows_of(task: Task, found: Found, device: str, dtype: str) -> list[SharingGpuRow]:
    """One of each contender."""
    problem, facts = task.problem, machine(device)
    flops = problem.flops(shared=True)
    passes = 3 if task.what == "forward+backward" else 1
    subject = Subject(f"sharing {task.what}", str(problem), dtype, passes * flops, facts)
    whole = next((name for name in REFERENCES if name in found.timings), None)
    rows = []
    for name, timing in found.timings.items():
        errors = found.errors.get(name)
        faster = speedup(timing, found.timings[whole]) if whole else None
        tokens = problem.tokens(shared=name not in (*REFERENCES, ALONE))
        saving = problem.tokens(shared=False) / problem.tokens(shared=True)
        row = SharingGpuRow.of(
            subject, name, kind_of(name), timing, errors.most if errors else None
        )
        row = dataclasses.replace(
            row,
            # a cache takes each row's last token in, and never reads on from it
            tokens=tokens - (problem.N if name == CACHED else 0),
            mean_error=errors.mean if errors else None,
            speedup=faster,
            of_tokens=faster and faster / saving,
            of_operations=faster and faster * flops / problem.flops(shared=False),
        )
        rows.append(row)
    return rows


def text_of(task: Task, rows: list[SharingGpuRow], missing: Missing) -> str:
    """The table of all tasks, and the savings that were reached."""
    if not rows:
        return f"{task}: nobody ran: {missing}"
    lines = [table(f"{task}, {rows[0].dtype}", rows, missing)]
    by_name = {row.impl: row for row in rows}
    whole = next((by_name[name] for name in REFERENCES if name in by_name), None)
    for row in rows:
        if row is whole or row.speedup is None or row.of_tokens is None or whole is None:
            continue
        saving = row.speedup / row.of_tokens
        text = f"  {row.impl}: {row.speedup:.2f} x {whole.impl}, {row.tokens} tokens a call"
        if task.what != "sampling" and row.impl != ALONE:
            text += (
                f", {row.of_tokens:.2f} of the {saving:.2f} x in tokens"
                f", {row.of_operations:.2f} of that in operations"
            )
        if row.mean_error is not None and whole.mean_error is not None:
            text += f"; mean error {row.mean_error:.1e}, {whole.impl} {whole.mean_error:.1e} nats"
        lines.append(text)
    ours = by_name.get("ours")
    if ours is not None and ours.of_tokens is not None and task.what == "forward":
        lines.append(f"  goal: {ours.of_tokens:.2f} of the saving in tokens (at least 0.85)")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
