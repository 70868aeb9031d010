"""Which implementation returns what on the inputs that implementations fail on.

    python -m bench.conformance                  # every peer that imports; prints two tables
    python -m bench.conformance --write          # and puts them into bench/README.md
    python -m bench.conformance --check          # ours alone, seconds

Fails unless ours is right everywhere. Each implementation runs in a process of its own, and kernels
for GPUs run under Triton's interpreter where there is no GPU.

From logits a case changes random logits. From hidden rows it changes a random head, whose last
column meets a 1 in every hidden row: a shift is in it, and so is a mask for an implementation
that takes no bias.

An input that ends the process of another library is no case: it is taken out, its row stays in the
tables as a `Record` of what was seen, in words, and is never run.

In reading order: cases and records; the command; one implementation in its process; a case made
into tensors, with the truth in fp64; the judge; tables.
"""

import argparse
import dataclasses
import functools
import json
import operator
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bench._measure import say, steps, write_between
from bench.peers import PEERS
from bench.peers.finding import Peer, available, interpret, reason

OPS = {"token_logprob": "From logits", "linear_logprob": "From hidden rows and the head"}
README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- conformance: python -m bench.conformance --write -->", "<!-- end -->"
LOST = 3  # exit code: the GPU was lost after the last answer
SECONDS = 300  # of one process: compiling takes a minute, a spin lock takes for ever
D = 128  # a width that every peer takes
IGNORED = -100
ABSOLUTE, RELATIVE = 1e-4, 1e-6  # of nats, of the largest logit: fp32's rounding and to spare
TF32 = 50  # times as much on a GPU, where Triton's fp32 products keep 10 bits unless told otherwise

Verdict = tuple[str, str]  # what it is, and what that rests on
Verdicts = dict[str, dict[str, dict[str, Verdict]]]  # op, implementation, case
Want = Literal["logprob", "entropy", "gradient", "entropy gradient"]
Layout = Literal["plain", "padded", "strided", "transposed", "unaligned"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One class of inputs. Rows 2 and 3 hold what is special about its targets."""

    name: str
    why: str
    V: int = 1000
    rows: int = 5
    scale: float = 3.0  # standard deviation of the logits
    shift: float = 0.0  # added to every logit
    masked: tuple[int, int] | None = None  # these columns are -inf
    masked_row: bool = False  # row 1 is -inf throughout: of logits only
    nan_row: bool = False  # row 1 holds a NaN
    targets: tuple[int | None, int | None] = (None, None)  # of rows 2 and 3
    ignored: bool = False  # every target is -100
    likeliest: bool = False  # every target is the row's most likely column
    want: Want = "logprob"
    layout: Layout = "plain"
    dtype: Literal["float32", "bfloat16"] = "float32"


# a whole block of any peer: they read 64 to 32 768 columns at a time
WIDE, FIRST, MIDDLE, LAST = 36_000, (0, 33_000), (1000, 35_000), (2900, 36_000)
CASES = (
    Case("first block masked", "a running maximum of -inf: (-inf) - (-inf)", WIDE, masked=FIRST),
    Case("middle block masked", "the same in the update and the merge", WIDE, masked=MIDDLE),
    Case("last block masked", "the same in the last merge", WIDE, masked=LAST),
    Case("one row all masked", "it is NaN or -inf, and no other row is", masked_row=True),
    Case("every column masked", "no maximum at all; NaN or -inf", masked=(0, 1000)),
    Case("target masked", "-inf, not NaN", masked=(10, 90), targets=(50, None)),
    Case("padded vocabulary", "rows past the tokenizer's tokens must not count", layout="padded"),
    Case("logits + 1e4", "shift invariance up to rounding", shift=1e4),
    Case("logits - 1e4", "a maximum that starts at 0 instead of -inf", shift=-1e4),
    Case("logits - 120", "the same, where exp underflows", shift=-120.0),
    Case("target -100", "an ignored position is 0, not memory out of bounds", targets=(-100, None)),
    Case("every target -100", "zeros everywhere", ignored=True),
    Case("every target -100, gradient", "exact zeros, on a graph", ignored=True, want="gradient"),
    Case("no rows", "a launch of no programs", rows=0),
    Case("one row", "a launch of one program", rows=1),
    Case("NaN in a row", "NaN there, and in no other row", nan_row=True),
    Case("p near 1", "log p is never above 0", rows=64, scale=30.0, shift=1e3, likeliest=True),
    Case("huge bf16 logits", "past fp16's 65 504, past bf16's 8 bits", scale=3e4, dtype="bfloat16"),
    Case("odd sizes", "a ragged tail in every block", V=32_001, rows=3),
    Case("strided", "a view of wider memory", layout="strided"),
    Case("transposed", "a view with the strides exchanged", layout="transposed"),
    Case("unaligned", "memory that begins 4 bytes off", layout="unaligned"),
    Case("gradient", "of log-prob, unlike weights a row", want="gradient"),
    Case("entropy", "per row", want="entropy"),
    Case("entropy, masked columns", "0 x (-inf)", masked=(10, 90), want="entropy"),
    Case("entropy, logits - 1e4", "shift invariance of entropy", shift=-1e4, want="entropy"),
    Case("entropy gradient", "dropped in silence by some", want="entropy gradient"),
    Case(
        "entropy gradient, masked columns",
        "0 x (-inf) again",
        want="entropy gradient",
        masked=(10, 90),
    ),
    Case("target out of range", "NaN or an error, never a number", targets=(1000, -7)),
)


@dataclasses.dataclass(frozen=True)
class Record:
    """A row that is not run: what was seen once, in words.

    `verdicts` are by op and implementation.
    """

    name: str
    text: str
    verdicts: dict[str, dict[str, str]]

    def of(self, op: str, implementation: str) -> Verdict:
        """As of a case; "-" of an implementation that was not there."""
        return self.verdicts[op].get(implementation, "-"), "recorded, not run"


RECORDS = (
    Record(
        "past 2^31 elements",
        "tensors with elements further apart than an int32 counts. cut-cross-entropy 25.1.1 ended "
        "its process (Triton 3.7.1's interpreter on a CPU, November 2026); verl 0.9.1 and the "
        "GRPO log-softmax of Liger 0.8.5 raised an exception there, the others were right. The "
        "tests of each kernel of ours cover such tensors.",
        {
            "token_logprob": dict.fromkeys(
                (
                    "ours",
                    "ours, Triton",
                    "log_softmax + gather",
                    "gather - logsumexp",
                    "torch.compile",
                    "TRL selective_log_softmax",
                    "TRL Triton",
                    "flash-attn cross entropy",
                    "Liger cross entropy",
                ),
                "right",
            )
            | {"Liger GRPO log-softmax": "raises"},
            "linear_logprob": dict.fromkeys(
                (
                    "ours",
                    "ours, Triton",
                    "ours, PyTorch route",
                    "eager",
                    "torch.compile",
                    "F.linear_cross_entropy",
                    "TRL tiled head",
                    "Liger FLCE",
                    "Liger scaled CE",
                    "Liger chunked PPO head",
                    "cut-cross-entropy compiled",
                ),
                "right",
            )
            | {"cut-cross-entropy": "crash", "verl": "raises"},
        },
    ),
)


def main() -> int:
    """Parse the flags; 0 where ours is right everywhere."""
    parser = argparse.ArgumentParser(description="who returns what on hard inputs")
    parser.add_argument("--check", action="store_true", help="ours alone, in this process")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {README.name}")
    parser.add_argument("--out", type=Path, help="write every verdict to this file, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="implementations whose name holds this")
    args = parser.parse_args()
    if args.check:
        return 0 if check() else 1
    asked = [(op, *c) for op in OPS for c in contenders(op, args.device) if args.only in c[0]]
    places = [f"{i}/{len(asked)}" for i in range(1, len(asked) + 1)]
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 4)) as pool:
        answers = list(pool.map(answered, places, *zip(*asked, strict=True)))
    verdicts: Verdicts = {op: {} for op in OPS}
    for (op, title, *_), answer in zip(asked, answers, strict=True):
        recorded = {record.name: record.of(op, title) for record in RECORDS}
        verdicts[op][title] = answer | recorded
    text = tables(verdicts, OPS)
    print(text)
    if args.write:
        write_between(README, BEGIN, END, text)
    if args.out:
        args.out.write_text(json.dumps(verdicts, indent=1))
    ours = [v for by in verdicts.values() for t, v in by.items() if t.startswith("ours")]
    return 0 if all(v in ("right", "-") for found in ours for v, _ in found.values()) else 1


def contenders(op: str, device: str) -> list[tuple[str, Peer, str]]:
    """A column's title, the implementation and where it runs; ours also under the interpreter."""
    listed = []
    for peer in PEERS[op]:
        if device in peer.devices:
            listed.append((peer.name, peer, device))
        if device == "cpu" and "interpreter" in peer.devices and find_spec("triton"):
            title = peer.name.replace("ours", "ours, Triton", 1)
            listed.append((title, peer, "interpreter"))
    return listed


def check() -> bool:
    """Whether ours is right on every case, in this process."""
    wrong = []
    found = {op: available([peer for peer in PEERS[op] if peer.ours], "cpu")[0] for op in OPS}
    asked = [(op, peer) for op, peers in found.items() for peer in peers]
    for op, peer in steps(asked, lambda one: f"{one[0]}: {one[1].name}"):
        for case in CASES:
            verdict, why = judged(peer, case, op, "cpu")
            if verdict not in ("right", "-"):
                wrong.append(f"{op}, {peer.name}, {case.name}: {verdict}, {why}")
    print("\n".join(wrong) or "ours: right everywhere")
    return not wrong


def answered(place: str, op: str, title: str, peer: Peer, device: str) -> dict[str, Verdict]:
    """The verdicts on `peer`, announced before and after: it may take minutes."""
    say(f"[{place}] {op}: {title}")
    found = ask(op, peer, device)
    say(f"{title}: {sum(verdict == 'right' for verdict, _ in found.values())} right", depth=1)
    return found


def ask(op: str, peer: Peer, device: str) -> dict[str, Verdict]:
    """Every verdict on `peer`; where its process ends or takes too long, the rest go on."""
    verdicts: dict[str, Verdict] = {}
    environment = os.environ | {"TRITON_INTERPRET": "1" if device == "interpreter" else "0"}
    program = "import sys; from bench.conformance import child; child(*sys.argv[1:])"
    command = [sys.executable, "-c", program, op, peer.name, device]
    while left := [case.name for case in CASES if case.name not in verdicts]:
        try:
            done = subprocess.run(
                [*command, *left], capture_output=True, text=True, env=environment, timeout=SECONDS
            )
            out, ended = done.stdout, ("crash", f"exit code {done.returncode}")
        except subprocess.TimeoutExpired as stopped:
            heard = stopped.stdout or b""
            out = heard.decode() if isinstance(heard, bytes) else str(heard)
            ended = "no answer", f"in {SECONDS} s"
        lines = [json.loads(line) for line in out.splitlines() if line.startswith('["')]
        verdicts |= {case: (verdict, why) for case, verdict, why in lines}
        if ended[1] == f"exit code {LOST}":
            continue
        unanswered = [name for name in left if name not in verdicts]
        if unanswered:
            verdicts[unanswered[0]] = ended
    return verdicts


def child(op: str, name: str, device: str, *cases: str) -> None:
    """Judge one implementation on the named cases; a JSON line each, as soon as it is known."""
    torch.set_num_threads(1)
    peers = [peer for peer in PEERS[op] if peer.name == name]
    found, missing = available(peers, device)
    ours = name.startswith("ours")
    if device == "interpreter" and not ours:
        interpret()
    for case in CASES:
        if case.name in cases:
            if missing:
                verdict = "absent", missing[name]
            elif (
                device == "interpreter" and case.dtype == "bfloat16" and not name.startswith("ours")
            ):
                verdict = "-", "the interpreter lacks much of bf16"
            else:
                verdict = judged(found[0], case, op, "cuda" if device == "cuda" else "cpu")
            print(json.dumps([case.name, *verdict]), flush=True)
            if device == "cuda" and not answers():
                sys.exit(LOST)


def answers() -> bool:
    """Whether the GPU still does: a kernel's wild read ends its use by this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Problem:
    """What an implementation is given: its tensors, (logits,) or (hidden, weight), and targets.

    A mask of a head is a bias of -inf; `folded` holds it for those that take none.
    """

    tensors: tuple[Tensor, ...]
    target: Tensor
    bias: Tensor | None = None

    def folded(self) -> tuple[Tensor, ...]:
        """The bias as part of the head: its last column meets a 1 in every hidden row."""
        if self.bias is None:
            return self.tensors
        x, w = self.tensors
        w = w.clone()
        w[:, -1] += self.bias
        return x, w

    def truth(self, want: str) -> Tensor:
        """fp64, on the CPU. NaN stands for: no number. Gradients are of sum (row + 1) x value."""
        leaves = [x.detach().cpu().double().requires_grad_() for x in self.tensors]
        z = leaves[0] if len(leaves) == 1 else leaves[0] @ leaves[1].T
        z = z if self.bias is None else z + self.bias.cpu().double()
        target, V = self.target.cpu(), z.shape[1]
        log_p, masked = z.log_softmax(1), z == float("-inf")
        if want.startswith("entropy"):
            finite = log_p.masked_fill(masked, 0.0)
            values = -(finite.exp() * finite * ~masked).sum(1)
        else:
            values = log_p.gather(1, target.clamp(0, V - 1)[:, None])[:, 0]
            values = values.masked_fill((target < 0) | (target >= V), float("nan"))
            values = torch.where(target == IGNORED, 0.0, values)
        return gradients(values, leaves) if want.endswith("gradient") else values.detach()


def gradients(values: Tensor, leaves: list[Tensor]) -> Tensor:
    """Of sum (row + 1) x value, end to end."""
    rows = torch.arange(1, len(values) + 1, device=values.device)
    found = torch.autograd.grad((rows * values).sum(), leaves)
    return torch.cat([g.flatten() for g in found])


def build(case: Case, op: str, device: str) -> Problem | None:
    """The case's tensors; None where `op` cannot be given it."""
    generator = torch.Generator().manual_seed(0)
    dtype, bias = getattr(torch, case.dtype), None

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    if op == "token_logprob":
        z = (case.scale * randn(case.rows, case.V) + case.shift).to(dtype)
        if case.masked:
            z[:, slice(*case.masked)] = float("-inf")
        if case.masked_row:
            z[1] = float("-inf")
        if case.nan_row:
            z[1, 7] = float("nan")
        tensors = (z,)
    else:
        if case.masked_row:
            return None
        x, w = randn(case.rows, D), randn(case.V, D) * case.scale / D**0.5
        x[:, -1], w[:, -1] = 1.0, case.shift
        if case.masked:
            bias = torch.zeros(case.V, device=device)
            bias[slice(*case.masked)] = float("-inf")
        if case.nan_row:
            x[1, 7] = float("nan")
        x, w = x.to(dtype), w.to(dtype)
        z, tensors = x.float() @ w.float().T, (x, w)
    target = _targets(case, z, generator)
    tensors = tuple(x.to(device) for x in tensors)
    # a vocabulary runs along the columns of logits and along the rows of a head
    layout = "padded head" if case.layout == "padded" and len(tensors) == 2 else case.layout
    return Problem((*tensors[:-1], laid_out(tensors[-1], layout)), target.to(device), bias)


def _targets(case: Case, z: Tensor, generator: torch.Generator) -> Tensor:
    """Random columns that are not masked, but where the case says otherwise."""
    if case.ignored:
        return torch.full((case.rows,), IGNORED)
    if case.likeliest:
        return z.argmax(1)
    first, last = case.masked or (0, 0)
    free = case.V - (last - first) or case.V
    target = torch.randint(free, (case.rows,), generator=generator)
    target += (last - first) * (target >= first) if free < case.V else 0
    for row, value in zip((2, 3), case.targets, strict=True):
        if value is not None:
            target[row] = value
    return target


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory, the rest of which holds large numbers."""
    rows, columns = x.shape
    spare = functools.partial(x.new_full, fill_value=50.0)
    if layout == "plain":
        return x
    if layout == "transposed":
        return x.T.contiguous().T
    wide = {
        "padded head": lambda: spare((rows + 40, columns))[:rows],
        "padded": lambda: spare((rows, columns + 40))[:, :columns],
        "strided": lambda: spare((2 * rows, columns + 8))[::2, :columns],
        "unaligned": lambda: spare((rows * columns + 1,))[1:].view(rows, columns),
    }
    return operator.methodcaller("copy_", x)(wide[layout]())


def judged(peer: Peer, case: Case, op: str, device: str) -> tuple[str, str]:
    """The verdict ("-": it has no such thing), and what it rests on."""
    problem = build(case, op, device)
    returned = "entropy" if case.want.startswith("entropy") else "logprob"
    if problem is None or returned not in peer.calls:
        return "-", "no such input or output"
    if problem.bias is not None and case.want.endswith("gradient") and not peer.takes_bias:
        return "-", "no bias, and a weight of -inf has no gradient"
    truth = problem.truth(case.want)
    # else a peer meets the limit of shapes that torch.compile is willing to see
    torch.compiler.reset()
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            got = _values(peer, problem, case.want, returned)
    # someone else's kernel can fail in any way
    except Exception as error:
        return "raises", reason(error)
    if got is None:
        return "-", "no gradient"
    if got.shape != truth.shape:
        return "wrong", f"shape {tuple(got.shape)} for {tuple(truth.shape)}"
    tolerance = _tolerance(case, problem, truth)
    if device == "cuda" and not peer.ours:
        tolerance *= TF32
    return _compared(got, truth, tolerance)


def _values(peer: Peer, problem: Problem, want: str, returned: str) -> Tensor | None:
    """What the peer returns for what is wanted, in fp64 on the CPU; None without a gradient."""
    differentiate = want.endswith("gradient")
    bias = [problem.bias] if peer.takes_bias and problem.bias is not None else []
    tensors = problem.tensors if bias else problem.folded()
    leaves = [x.detach().requires_grad_(differentiate) for x in tensors]
    out = peer.calls[returned](*leaves, problem.target, *bias)
    values = out[1] if returned == "entropy" else out
    if differentiate:
        if not values.requires_grad:
            return None
        values = gradients(values, leaves)
    return values.detach().double().cpu()


def _tolerance(case: Case, problem: Problem, truth: Tensor) -> float:
    if case.want.endswith("gradient"):
        return ABSOLUTE * max(1.0, truth.abs().max().item())
    widest = problem.tensors[0].abs().amax() if truth.numel() else torch.tensor(0.0)
    if len(problem.tensors) == 2:
        widest = torch.tensor(5 * case.scale + abs(case.shift))
    finite = float(torch.nan_to_num(widest.cpu().float(), 0.0, 0.0, 0.0))
    return ABSOLUTE + RELATIVE * finite


def _compared(got: Tensor, truth: Tensor, tolerance: float) -> tuple[str, str]:
    """Each wanted number within tolerance, -inf as -inf, and no number where there is none."""
    number, minus_inf, none = truth.isfinite(), truth == float("-inf"), truth.isnan()
    if (got[number | minus_inf]).isnan().any():
        return "NaN", f"{int(got[number | minus_inf].isnan().sum())} of {truth.numel()}"
    if (got[none] > float("-inf")).any():
        return "wrong", f"{got[none].max().item():.4g} where there is no number"
    if (got[minus_inf] > -1e30).any():
        return "wrong", f"{got[minus_inf].max().item():.4g} for -inf"
    error = (got[number] - truth[number]).abs().max().item() if number.any() else 0.0
    if not error <= tolerance:
        return "wrong", f"off by {error:.2g}"
    if (got[number] > 0).any() and (truth[number] <= 0).all():
        return "wrong", f"log p = {got[number].max().item():.1g}"
    return "right", f"within {error:.1g}"


def tables(verdicts: Verdicts, titles: dict[str, str]) -> str:
    """One Markdown table an op, a row a case or record; then what was not run, and why."""
    parts = []
    for op, by_name in verdicts.items():
        here = {name: v for name, v in by_name.items() if _absence(v) is None}
        absent = {name: _absence(v) for name, v in by_name.items() if name not in here}
        rows = [["", *here], ["---"] * (len(here) + 1)]
        for row in (*CASES, *RECORDS):
            title = row.name if isinstance(row, Case) else f"{row.name} (recorded, not run)"
            rows.append([title, *(_cell(*found[row.name]) for found in here.values())])
        right = (sum(v == "right" for v, _ in found.values()) for found in here.values())
        of = (sum(v != "-" for v, _ in found.values()) for found in here.values())
        rows.append(["**right**", *(f"{n} of {m}" for n, m in zip(right, of, strict=True))])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        parts.append(f"{titles[op]}:\n\n" + "\n".join(lines))
        parts += [f"Not run: {name} ({why})." for name, why in absent.items()]
    parts += [f"Not run: {record.name}, {record.text}" for record in RECORDS]
    return "\n\n".join(parts)


def _absence(found: dict[str, Verdict]) -> str | None:
    reasons = [why for verdict, why in found.values() if verdict == "absent"]
    return reasons[0] if reasons else None


def _cell(verdict: str, why: str) -> str:
    if verdict == "wrong":
        return f"**wrong**, {why}"
    return {"right": "right", "-": ""}.get(verdict, f"**{verdict}**")


if __name__ == "__main__":
    raise SystemExit(main())
