"""Attention on trees alone: its rate on the tiles that are not empty, beside flash and Flex.

    python -m bench.tree_attention                  # every tree, bf16 on a GPU
    python -m bench.tree_attention --K 128 --out FILE.jsonl
    python -m bench.tree_attention --check          # tiny, agreement with fp64 alone

The floor is what flash kernels do on a causal sequence of as many tiles (flash-attn where it can be
imported, PyTorch's otherwise): n tiles a side have n (n + 1) / 2 that are not empty, and the rate
there is what a kernel could reach on the tree, had it the tree's mask. FlexAttention has the tree's
mask, made before it is timed; ours makes its lists of tiles in every call. Operations: 4 K a pair
of query and key in those tiles forward, 3.5 times as many with the gradients of q, k and v.

In reading order: the trees; the command; the truth in fp64; the contenders; rows and text.
T packed tokens, H query heads, Hkv key heads, K head size.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench._measure import (
    Kind,
    Row,
    Subject,
    flags,
    machine,
    measure,
    missing_lines,
    parsed,
    steps,
    write,
)
from bench.peers.attention import PEERS, Attend
from bench.peers.finding import Missing, available, reason
from sharpen_kernels.tree import Tree

TILE = 128  # of queries and of keys: what work is counted in, whatever tiles a kernel has
BLOCK = 512  # queries of the truth at a time; chosen


class Inputs(NamedTuple):
    """Queries, keys, values and the output's gradient, [heads, T, K] each."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attention on one tree; `levels` are (children of each node above, tokens of each child)."""

    name: str
    levels: tuple[tuple[int, int], ...]
    heads: tuple[int, int]  # of queries and of keys
    K: int

    def __str__(self) -> str:
        H, Hkv = self.heads
        return f"{self.name} H={H} Hkv={Hkv} K={self.K}"

    def tree(self) -> Tree:
        """On the CPU."""
        parent: list[int] = []

        def grow(above: int, levels: tuple[tuple[int, int], ...]) -> None:
            if levels:
                (n, length), *rest = levels
                for _ in range(n):
                    start = len(parent)
                    parent.extend([above, *range(start, start + length - 1)])
                    grow(start + length - 1, tuple(rest))

        grow(-1, self.levels)
        return Tree.of(torch.tensor(parent))

    def flops(self, n_tiles: int, *, backward: bool) -> float:
        """Of two products of every tile of every head, and five more for the gradients."""
        forward = 4.0 * self.K * self.heads[0] * n_tiles * TILE**2
        return forward * 3.5 if backward else forward

    def inputs(self, T: int, dtype: torch.dtype, device: str) -> Inputs:
        """Random; logits of standard deviation 2; a token's heads side by side in memory."""
        torch.manual_seed(0)
        H, Hkv = self.heads
        every = (torch.randn(T, n, self.K, device=device) for n in (H, Hkv, Hkv, H))
        q, k, v, dout = (x.to(dtype).transpose(0, 1) for x in every)
        return Inputs(q * 2, k, v, dout)


BUSH = "P=2048 C=256 N=64"
TRIE = "trie 1000 + 8 x (500 + 4 x (200 + 4 x 100))"  # no run is whole tiles
LEVELS = {
    BUSH: ((1, 2048), (64, 256)),
    TRIE: ((1, 1000), (8, 500), (4, 200), (4, 100)),
}
HEADS = {128: (32, 8), 64: (14, 2)}  # Llama-3.1-8B, Qwen2.5-0.5B: of queries and keys, by K
PROBLEMS = [Problem(name, LEVELS[name], HEADS[K], K) for K in HEADS for name in LEVELS]
CHECKED = [
    Problem("P=150 C=9 N=3", ((1, 150), (3, 9)), (4, 2), 16),
    Problem("trie", ((2, 20), (2, 11), (3, 40)), (2, 1), 32),
]
# chosen; fp32 rounds to some 1e-6, and bf16 to half a percent
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def check(device: str) -> None:
    """Every contender that is there runs tiny, and those with the tree's mask agree with fp64."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    for problem, backward in steps(both_ways(CHECKED), title):
        rows, missing = run(problem, dtype, device, 0.0, backward=backward)
        print(text_of(rows, missing))
        assert {"ours", "floor"} <= {row.kind for row in rows}, missing
        for row in rows:
            judged = row.errors or {}
            assert row.kind == "floor" or len(judged) == (4 if backward else 1), row
            assert all(error <= TOLERANCE[dtype] for error in judged.values()), row
        if not backward:
            assert "FlexAttention" in {row.impl for row in rows}, missing


def main() -> None:
    """Parse the flags; check or measure."""
    parser = flags("attention on trees alone", seconds=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, help="default: bfloat16 on a GPU")
    parser.add_argument("--K", type=int, choices=HEADS, help="one head size")
    parser.add_argument("--tree", nargs="+", help="trees whose name begins so; default: all")
    parser.add_argument("--heads", type=int, nargs=2, metavar=("H", "Hkv"), help="other heads")
    args = parsed(parser)
    if args.check:
        check(args.device)
        return
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    problems = [
        dataclasses.replace(problem, heads=tuple(args.heads)) if args.heads else problem
        for problem in PROBLEMS
        if args.K in (None, problem.K)
        and (not args.tree or problem.name.startswith(tuple(args.tree)))
    ]
    compiled = 0
    for problem, backward in steps(both_ways(problems), title):
        # else FlexAttention meets the limit of shapes that torch.compile is willing to see
        if compiled != problem.K:
            torch.compiler.reset()
            compiled = problem.K
        rows, missing = run(problem, dtype, args.device, args.seconds, backward=backward)
        if rows:
            print(text_of(rows, missing), flush=True)
        else:
            print(f"{problem}: nobody ran: {missing}", flush=True)
        if args.out:
            write(rows, args.out)


def both_ways(problems: list[Problem]) -> list[tuple[Problem, bool]]:
    """Each problem forward, then with gradients."""
    return [(problem, backward) for problem in problems for backward in (False, True)]


def title(step: tuple[Problem, bool]) -> str:
    """Of one step, for progress."""
    problem, backward = step
    return f"{problem}, {'forward+backward' if backward else 'forward'}"


def n_tiles(tree: Tree) -> int:
    """Tiles of TILE x TILE in which some query sees some key."""
    n = -(-tree.T // TILE)
    last = pad(tree.end.cpu(), (0, n * TILE - tree.T)).view(n, TILE).amax(dim=1)
    start = torch.arange(n) * TILE
    return int(((start <= start[:, None]) & (last > start[:, None])).sum())


def truth(inputs: Inputs, tree: Tree) -> dict[str, Tensor]:
    """Output and gradients of the first key head and its query heads, in fp64."""
    H, T, K = inputs.q.shape
    n = H // inputs.k.shape[0]
    q, dout = inputs.q[:n].double(), inputs.dout[:n].double()
    k, v = inputs.k[0].double(), inputs.v[0].double()
    out, dq = torch.empty_like(dout), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    place = torch.arange(T, device=q.device)
    for rows in place.split(BLOCK):
        hidden = (place > rows[:, None]) | (rows[:, None] >= tree.end)
        z = (q[:, rows] @ k.T * K**-0.5).masked_fill_(hidden, float("-inf"))
        p = z.softmax(dim=2)
        out[:, rows] = p @ v
        dy = dout[:, rows]
        dv += (p.mT @ dy).sum(dim=0)
        delta = (dy * out[:, rows]).sum(dim=2, keepdim=True)
        dz = p * (dy @ v.T - delta) * K**-0.5
        dq[:, rows] = dz @ k
        dk += (dz.mT @ q[:, rows]).sum(dim=0)
    return {"out": out, "dq": dq, "dk": dk[None], "dv": dv[None]}


def errors(found: tuple[Tensor, ...], want: dict[str, Tensor]) -> dict[str, float]:
    """Of what a contender returned (out, dq, dk, dv): ||x - truth|| / ||truth||."""
    return {
        name: ((x[: len(y)].double() - y).norm() / y.norm()).item()
        for x, (name, y) in zip(found, want.items(), strict=False)
    }


class Way(NamedTuple):
    """One contender: its inputs, and how many of their tiles are not empty."""

    kind: Kind
    attend: Attend
    inputs: Inputs
    n_tiles: int

    def forward(self) -> Tensor:
        """Output alone."""
        with torch.no_grad():
            return self.attend(*self.inputs[:3])

    def backward(self) -> tuple[Tensor, ...]:
        """Output, and gradients of q, k and v."""
        leaves = [x.detach().requires_grad_() for x in self.inputs[:3]]
        out = self.attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, self.inputs.dout)


def ways(problem: Problem, dtype: torch.dtype, device: str) -> tuple[Tree, dict[str, Way], Missing]:
    """The tree on `device`, the contenders by name, and who is missing and why."""
    tree = problem.tree().to(device)
    tiles = n_tiles(tree)
    side = round((math.sqrt(8 * tiles + 1) - 1) / 2)
    inputs = problem.inputs(tree.T, dtype, device)
    causal = problem.inputs(side * TILE, dtype, device)
    found, missing = available(PEERS, device)
    taking: dict[str, Way] = {}
    for peer in found:
        kind: Kind = "ours" if peer.name == "ours" else "exact"
        if "causal" in peer.calls:
            half = side * (side + 1) // 2
            taking[peer.name] = Way("floor", peer.calls["causal"], causal, half)
            continue
        try:
            taking[peer.name] = Way(kind, peer.calls["tree"](tree), inputs, tiles)
        # a mask that does not fit is no reason to stop
        except Exception as error:
            missing[peer.name] = reason(error)
    return tree, taking, missing


@dataclasses.dataclass(frozen=True)
class AttentionRow(Row):
    """A row; its rate is of the tiles that are not empty, its error ||x - truth|| / ||truth||."""

    n_tiles: int = 0  # of 128 x 128, a head
    errors: dict[str, float] | None = None  # of the output and of each gradient


def run(
    problem: Problem, dtype: str, device: str, seconds: float, *, backward: bool
) -> tuple[list[AttentionRow], Missing]:
    """Measure the contenders in turns; each of the tree is judged against fp64."""
    tree, taking, missing = ways(problem, getattr(torch, dtype), device)
    calls = {name: way.backward if backward else way.forward for name, way in taking.items()}
    timings, failed = measure(calls, device, seconds)
    of_tree = [name for name in timings if taking[name].kind != "floor"]
    want = truth(taking[of_tree[0]].inputs, tree) if of_tree else {}
    op = f"tree_attention {'forward+backward' if backward else 'forward'}"
    facts, rows = machine(device), []
    for name, timing in timings.items():
        way, judged = taking[name], None
        if name in of_tree:
            got = calls[name]()
            judged = errors(got if isinstance(got, tuple) else (got,), want)
        flops = problem.flops(way.n_tiles, backward=backward)
        subject = Subject(op, str(problem), dtype, flops, facts)
        most = max(judged.values()) if judged else None
        row = AttentionRow.of(subject, name, way.kind, timing, most)
        row = dataclasses.replace(row, n_tiles=way.n_tiles, errors=judged)
        rows.append(row)
    return rows, missing | failed


def text_of(rows: list[AttentionRow], missing: Missing) -> str:
    """A line a contender in the order of rate, and what ours reaches of the others."""
    first = rows[0]
    lines = [f"{first.op}, {first.shape}, {first.dtype}, {first.machine['device']}"]
    for row in sorted(rows, key=lambda row: -row.tflop_per_s):
        error = "" if row.max_error is None else f"{row.max_error:.0e}"
        lines.append(
            f"  {row.impl:22}{row.median_us / 1e3:10.3f} ms{row.spread:7.1%}{row.n_tiles:8} tiles"
            f"{row.tflop_per_s:9.4g} TFLOP/s{row.peak_extra_mib:9.1f} MiB{error:>7}"
        )
    return "\n".join([*lines, *missing_lines(missing), *verdicts(rows)])


def verdicts(rows: list[AttentionRow]) -> list[str]:
    """Ours beside the fastest flash kernel's rate and FlexAttention's time."""
    by_name = {row.impl: row for row in rows}
    ours, flex = by_name.get("ours"), by_name.get("FlexAttention")
    if ours is None:
        return ["  goal: ours was not measured"]
    lines = []
    # where flash-attn is, its rate is the goal's; PyTorch's copies of it stand in
    flash = [row for row in rows if row.impl.startswith("causal, flash-attn")]
    flash = flash or [row for row in rows if row.kind == "floor"]
    for row in flash:
        share = ours.tflop_per_s / row.tflop_per_s
        lines.append(f"  goal: {share:.2f} of the rate of {row.impl} (at least 0.70)")
    if flex:
        times = flex.median_us / ours.median_us
        lines.append(f"  goal: {times:.2f} x as fast as FlexAttention (above 1)")
    return lines


if __name__ == "__main__":
    main()
