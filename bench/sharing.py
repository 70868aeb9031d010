"""What sharing a prompt saves: in scoring, in a training step, in sampling.

    python -m bench.sharing                               # every task
    python -m bench.sharing --what forward --shape 512 64 16 --threads 1 --out FILE.jsonl
    python -m bench.sharing --chart docs/sharing.svg      # seconds against N, beside P + N C
    python -m bench.sharing --check                       # tiny shapes, agreement alone

Scoring and training: a random Llama of 4 layers x 256, V = 8192, beside the padded batch with
`logits_to_keep` and beside a DynamicCache of the prompt that is repeated N times. Sampling and
scoring of samples: the model that ships, its prompts after six worked examples, beside `generate`
and padded batches of whole sequences. All fp32 on a CPU.

In reading order: the command; tasks and their rows; log-probs and gradients of the Llama by each
way; what autograd keeps; the model that ships; the chart.
"""

import argparse
import dataclasses
import functools
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import transformers
from torch import Tensor, nn

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
from bench._sharing import (
    Problem,
    V,
    by_padded_batch,
    check_gradients,
    errors,
    gathered,
    gradients,
    llama,
)
from bench.peers.finding import Missing
from sharpen import Scorer
from sharpen.commands.inputs import open_source
from sharpen.commands.options import PromptOptions
from sharpen.models import load_model, load_tokenizer
from sharpen.sampling import SamplingConfig
from sharpen.sampling.base import render_all
from sharpen.sampling.hf import TransformersSampler

What = Literal["forward", "forward+backward", "sampling", "scoring"]
WHATS: tuple[What, ...] = get_args(What)
WAYS = {"ours, auto": "auto", "ours, tree": "tree", "ours, cache": "cache"}
PADDED, CACHED, BOUNDED = "padded batch", "DynamicCache", "ours, bounded"
SAMPLERS = {"ours, shared": "shared", "generate": "none"}
SCORERS = {"ours, auto": "auto", "whole sequences": "none"}
NAMES: dict[What, tuple[str, ...]] = {
    "forward": (*WAYS, PADDED, CACHED),
    "forward+backward": (*WAYS, PADDED, CACHED, BOUNDED),
    "sampling": tuple(SAMPLERS),
    "scoring": tuple(SCORERS),
}
LIMIT_GIB = 20.0  # of what the padded batch may hold; chosen
MAX_TOKENS = 32768  # of a batch of the model that ships, as `bon` has it

Ways = dict[str, Callable[[], Tensor]]


class Found(NamedTuple):
    """What came of one task."""

    timings: dict[str, Timing]
    missing: Missing
    errors: dict[str, float]  # nats
    flops: float
    saved_mib: dict[str, float] | None = None
    gradient_error: float | None = None  # largest difference over largest gradient


@dataclasses.dataclass(frozen=True)
class Task:
    """One group of contenders. `shape` is (P, C, N), or (prompts, C, N) of the model that ships."""

    what: What
    shape: tuple[int, int, int]

    def __str__(self) -> str:
        letters = ("P", "C", "N") if self.what.startswith("forward") else ("prompts", "C", "N")
        sizes = (f"{k}={n}" for k, n in zip(letters, self.shape, strict=True))
        return f"sharing {self.what}, {' '.join(sizes)}, float32, cpu"

    @property
    def sizes(self) -> str:
        """The shape with its letters."""
        return str(self).split(", ")[1]

    def run(self, seconds: float) -> Found:
        """Measure the contenders; a RuntimeError if one fails, or they disagree."""
        if self.what in ("sampling", "scoring"):
            puzzles = Puzzles(*self.shape)
            ways = puzzles.sampling() if self.what == "sampling" else puzzles.scoring()
            timings, last = _timed(ways, seconds)
            puzzles.check_draws()
            return Found(timings, {}, errors(None, last), puzzles.flops)
        problem = Problem(*self.shape)
        # one model each, of the same weights: ours has hooks in its own
        ours, plain = llama(), llama()
        if self.what == "forward+backward":
            ways = backward_ways(problem, ours, plain)
            timings, last = _timed(ways, seconds)
            more = _saved(ways, {n: ours if n.startswith("ours") else plain for n in ways})
            return Found(timings, {}, errors(problem, last), 3 * problem.flops, *more)
        ways = forward_ways(problem, ours, plain)
        missing: Missing = {}
        if problem.padded_gib > LIMIT_GIB:
            missing[PADDED] = f"would hold {problem.padded_gib:.0f} GiB"
            del ways[PADDED]
        with torch.no_grad():
            timings, last = _timed(ways, seconds)
        return Found(timings, missing, errors(problem, last), problem.flops)


def _timed(ways: Ways, seconds: float) -> tuple[dict[str, Timing], dict[str, Tensor]]:
    """Timings, and all that each contender returned last."""
    last: dict[str, Tensor] = {}

    def call(name: str) -> Tensor:
        last[name] = ways[name]().detach()
        return last[name]

    calls: Ways = {name: lambda name=name: call(name) for name in ways}
    timings, failed = measure(calls, "cpu", seconds)
    if failed:
        raise RuntimeError(f"a contender failed: {failed}")
    return timings, last


def _saved(ways: Ways, models: dict[str, nn.Module]) -> tuple[dict[str, float], float]:
    """MiB kept for backward by each, and how far apart their gradients are."""
    saved, found = {}, {}
    for name, way in ways.items():
        saved[name] = saved_mib(way, models[name])
        found[name] = gradients(models[name])
    return saved, check_gradients(found)


TASKS = [
    Task("forward", (512, 64, 16)),
    Task("forward", (2048, 64, 16)),
    Task("forward", (512, 64, 1)),
    Task("forward", (16, 64, 16)),
    Task("forward+backward", (512, 64, 16)),
    Task("sampling", (4, 48, 50)),
    Task("scoring", (4, 48, 50)),
]
CHECKED = [
    Task("forward", (20, 5, 3)),
    Task("forward", (7, 2, 1)),
    Task("forward+backward", (20, 5, 6)),
    Task("sampling", (2, 6, 3)),
    Task("scoring", (2, 6, 3)),
]
CHART = [Task("forward", (512, 64, n)) for n in (1, 4, 16, 64, 256)]


def main() -> None:
    """Parse the flags and measure."""
    parser = flags("what sharing a prompt saves", seconds=5.0)
    parser.add_argument("--what", choices=WHATS)
    letters = ("P", "C", "N")
    parser.add_argument("--shape", type=int, nargs=3, metavar=letters, help="P: prompts of game24")
    parser.add_argument("--chart", type=Path, help="draw scoring against N into this file instead")
    args = parsed(parser)
    every: list[Row] = []
    for task in steps(chosen(args)):
        rows, _, text = measured(task, 0.0 if args.check else args.seconds)
        print(text, flush=True)
        every += rows
        if args.out:
            write(rows, args.out)
    if args.chart:
        chart(every, args.chart)


def chosen(args: argparse.Namespace) -> list[Task]:
    """The tasks that the flags name."""
    if args.check or args.chart:
        return CHECKED if args.check else CHART
    shape = tuple(args.shape) if args.shape else None
    if shape:
        return [Task(args.what or "forward", shape)]
    return [task for task in TASKS if args.what in (None, task.what)]


def measured(task: Task, seconds: float) -> tuple[list[Row], dict[str, tuple[float, ...]], str]:
    """Rows, the seconds of each round, and the table."""
    transformers.logging.disable_progress_bar()
    found = task.run(seconds)
    seen = {name: timing.seconds for name, timing in found.timings.items()}
    return rows_of(task, found), seen, text_of(task, found)


@dataclasses.dataclass(frozen=True)
class SharingRow(Row):
    """A row, and what autograd kept for backward."""

    saved_mib: float | None = None


def rows_of(task: Task, found: Found) -> list[Row]:
    """One of each contender."""
    subject = Subject(f"sharing {task.what}", task.sizes, "float32", found.flops, machine("cpu"))
    rows: list[Row] = []
    for name, timing in found.timings.items():
        row = SharingRow.of(subject, name, kind_of(name), timing, found.errors.get(name))
        kept = round(found.saved_mib[name], 2) if found.saved_mib else None
        rows.append(dataclasses.replace(row, saved_mib=kept))
    return rows


def text_of(task: Task, found: Found) -> str:
    """The table of all tasks, then ours over each peer, round by round, and what backward keeps."""
    lines = [table(str(task), rows_of(task, found), found.missing)]
    peers = [name for name in found.timings if not name.startswith("ours")]
    for name, own in found.timings.items():
        if name not in peers:
            times = [f"{speedup(own, found.timings[peer]):.2f} x {peer}" for peer in peers]
            lines.append(f"  {name}: {', '.join(times)}")
    if found.saved_mib:
        kept = [f"{name} {mib:.1f}" for name, mib in found.saved_mib.items()]
        lines.append(f"  saved for backward, MiB: {', '.join(kept)}")
        lines.append(f"  gradients differ by {found.gradient_error:.0e} of the largest")
    return "\n".join(lines)


def by_cache(model: Any, prompt: Tensor, completions: Tensor) -> Tensor:
    """Log-probs [N x C] from a DynamicCache of the prompt, repeated for its completions."""
    N = len(completions)
    first = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
    cache = first.past_key_values
    cache.batch_repeat_interleave(N)
    rest = model(input_ids=completions[:, :-1], past_key_values=cache, use_cache=True).logits
    return gathered(torch.cat([first.logits.expand(N, 1, V), rest], dim=1), completions)


def forward_ways(problem: Problem, ours: Any, plain: Any) -> Ways:
    """Log-probs [N x C] by each way; differentiable. Routes of ours are found here.

    Ours and the peers each have a model of their own with the same weights, so that no hook of ours
    is in the way of a peer.
    """
    prompt, completions = problem.ids()
    lists = [prompt.tolist()], [completions.tolist()]
    ways: Ways = {}
    for name, way in WAYS.items():
        scorer = Scorer(ours, sharing=way, max_tokens=2**17)
        assert scorer.route.sharing == ("tree" if way == "auto" else way)
        ways[name] = functools.partial(scorer.logprobs, *lists)
    ways[PADDED] = functools.partial(by_padded_batch, plain, prompt, completions)
    ways[CACHED] = functools.partial(by_cache, plain, prompt, completions)
    return ways


def backward_ways(problem: Problem, ours: Any, plain: Any) -> Ways:
    """Log-probs, and the gradients of their sum in every parameter."""
    prompt, completions = problem.ids()
    # four rows at a time
    scorer = Scorer(ours, max_tokens=4 * (problem.P + problem.C))
    lists = [prompt.tolist()], [completions.tolist()]
    slopes = torch.ones(completions.numel())
    scorer.backward(*lists, slopes)

    def step(model: Any, way: Callable[[], Tensor]) -> Tensor:
        model.zero_grad()
        found = way()
        found.sum().backward()
        return found.detach()

    def in_parts() -> Tensor:
        ours.zero_grad()
        return scorer.backward(*lists, slopes)

    ways = forward_ways(problem, ours, plain)
    of = {name: ours if name in WAYS else plain for name in ways}
    timed: Ways = {n: functools.partial(step, of[n], way) for n, way in ways.items()}
    return {**timed, BOUNDED: in_parts}


class _Held(list[Tensor]):
    """What takes a saved tensor's place; its end is that of the saving."""

    __slots__ = ("__weakref__",)


def saved_mib(run: Callable[[], object], model: nn.Module) -> float:
    """The most that one call keeps for backward at a time, beside the parameters of `model`.

    A view counts its whole storage. What a function keeps without telling autograd is not seen:
    `peak_extra_mib` of a row sees all.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    holders: Counter[int] = Counter()
    now = peak = 0

    def forget(key: int, n_bytes: int) -> None:
        nonlocal now
        holders[key] -= 1
        now -= n_bytes if holders[key] == 0 else 0

    def pack(x: Tensor) -> _Held:
        nonlocal now, peak
        held = _Held([x])
        storage = x.untyped_storage()
        key, n_bytes = storage.data_ptr(), storage.nbytes()
        if key not in own:
            holders[key] += 1
            now += n_bytes if holders[key] == 1 else 0
            peak = max(peak, now)
            weakref.finalize(held, forget, key, n_bytes)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held[0]):
        run()
    assert now == 0, f"{now} bytes outlived the backward pass"
    return peak / 2**20


@dataclasses.dataclass
class Puzzles:
    """Best-of-n on the model that ships: some prompts, and the ids that each contender drew last.

    As `sharpen bon --model game24 --task game24 --split sharpen --shots 6 -n 50` runs them, against
    `generate` on N copies of each prompt, and padded batches of whole sequences.
    """

    n_prompts: int
    max_new_tokens: int
    n: int
    drawn: dict[str, list[list[list[int]]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the prompts."""
        self.config = SamplingConfig(n=self.n, max_new_tokens=self.max_new_tokens)
        self.tokenizer = load_tokenizer("game24")
        options = PromptOptions(task="game24", split="sharpen", shots=6, limit=self.n_prompts)
        self.prompts = render_all(open_source(options, self.tokenizer).records, self.tokenizer)

    @property
    def flops(self) -> float:
        """Of every prompt token once and every token drawn, in the layers and the head."""
        n = sum(p.numel() for p in load_model("game24").parameters())
        groups = next(iter(self.drawn.values()), [])
        n_drawn = sum(len(ids) for group in groups for ids in group)
        return 2.0 * n * (sum(len(prompt.ids) for prompt in self.prompts) + n_drawn)

    def sampling(self) -> dict[str, Callable[[], Tensor]]:
        """Draw all samples; their log-probs, end to end."""
        return {name: self._sampler(name, way) for name, way in SAMPLERS.items()}

    def _sampler(self, name: str, sharing: str) -> Callable[[], Tensor]:
        model = load_model("game24")
        sampler = TransformersSampler(model, self.tokenizer, max_tokens=MAX_TOKENS, sharing=sharing)
        assert sampler.route == ("shared" if sharing == "shared" else "generate")

        def call() -> Tensor:
            found = {s.prompt_id: s for b in sampler.sample(self.prompts, self.config) for s in b}
            every = [found[prompt.id] for prompt in self.prompts]
            self.drawn[name] = [samples.completion_ids for samples in every]
            return torch.tensor([x for s in every for row in s.logprobs for x in row])

        return call

    def scoring(self) -> dict[str, Callable[[], Tensor]]:
        """Score the samples that ours draws; their log-probs, end to end."""
        self._sampler("ours, shared", "shared")()
        (completions,) = self.drawn.values()
        prompts = [list(prompt.ids) for prompt in self.prompts]
        return {name: _scorer(way, prompts, completions) for name, way in SCORERS.items()}

    def check_draws(self) -> None:
        """Raise unless every contender drew the same token ids."""
        first, *others = self.drawn.values()
        if any(other != first for other in others):
            raise RuntimeError("the contenders drew different tokens")


def _scorer(sharing: str, prompts: list[list[int]], completions: Any) -> Callable[[], Tensor]:
    scorer = Scorer(load_model("game24"), sharing=sharing, max_tokens=MAX_TOKENS)
    assert (scorer.route.sharing == "none") == (sharing == "none")

    def call() -> Tensor:
        found = scorer.score(prompts, completions).tokens.logprob
        assert found is not None
        return found

    return call


# of every contender, in the order of the legend: colour, marker
STYLES = {
    "padded batch": ("#c44e52", "s"),
    "DynamicCache": ("#8172b3", "D"),
    "ours, cache": ("#64b5cd", "^"),
    "ours, tree": ("#1f6fb4", "o"),
}


def chart(rows: list[Row], path: Path) -> None:
    """One SVG; both models pass through the padded batch at the least N."""
    import matplotlib

    matplotlib.use("svg")
    # text as text, and the same ids in every run
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "sharpen"}
    from matplotlib import pyplot

    P, C = (int(part[2:]) for part in rows[0].shape.split()[:2])
    counts = sorted({_n(row) for row in rows})
    figure, axes = pyplot.subplots(figsize=(7.2, 4.4), layout="constrained", facecolor="white")
    for name, (color, marker) in STYLES.items():
        own = sorted((row for row in rows if row.impl == name), key=_n)
        seconds = [row.median_us / 1e6 for row in own]
        axes.plot([_n(r) for r in own], seconds, color=color, marker=marker, ms=5, label=name)
    start = next(r.median_us / 1e6 for r in rows if r.impl == "padded batch" and _n(r) == counts[0])
    per_token = start / (counts[0] * (P + C))
    grid = [counts[0] * (counts[-1] / counts[0]) ** (i / 40) for i in range(41)]
    models = {"N (P + C) tokens": (":", lambda n: n * (P + C))}
    models["P + N C tokens"] = ("--", lambda n: P + n * C)
    for label, (line, tokens) in models.items():
        seconds = [tokens(n) * per_token for n in grid]
        axes.plot(grid, seconds, color="#555555", ls=line, lw=1.2, label=label, zorder=1)
    axes.set(xscale="log", yscale="log", xlabel="completions of one prompt, N")
    axes.set_ylabel("seconds to score them all")
    facts = rows[0].machine
    threads = "1 thread" if facts["threads"] == "1" else f"{facts['threads']} threads"
    title = f"Prompt of P = {P} tokens, completions of C = {C}"
    axes.set_title(f"{title}\n{facts['device']}, {threads}, fp32", fontsize=10)
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.grid(color="#e5e5e5", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _n(row: Row) -> int:
    return int(row.shape.rpartition("=")[2])


if __name__ == "__main__":
    main()
