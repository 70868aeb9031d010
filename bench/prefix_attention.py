"""One decoding step of attention whose rows share a prefix, beside attention on copies of it.

    python -m bench.prefix_attention              # every task; bf16 on a GPU
    python -m bench.prefix_attention --shape 1 64 2048 64 --K 128 --threads 1 --out FILE.jsonl
    python -m bench.prefix_attention --check      # tiny, agreement with fp64 alone

Memory bound: with n rows of each of G prefixes, 2 Hkv K (G P + G n L) numbers are read once, where
copies of the prefix make it 2 Hkv K G n (P + L); the floor is one read of the former (their sums).
Operations: 4 K a pair of query and key. The peers are PyTorch's scaled_dot_product_attention on
keys and values that were copied for each row before (what a repeated DynamicCache holds; its memory
is not counted) and on copies made in the call. Errors are of the output of the first row.

G prefixes, n rows of each, P keys of a prefix, L own keys of a row, H query heads, Hkv key heads,
K head size.
"""

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench._measure import (
    Contender,
    Results,
    Subject,
    compare,
    flags,
    machine,
    parsed,
    steps,
    table,
    write,
)
from bench.peers.finding import Missing
from sharpen_kernels.prefix_attention import PrefixRows, prefix_attention

HEADS = {128: (32, 8), 64: (14, 2)}  # Llama-3.1-8B, Qwen2.5-0.5B: of queries and keys, by K
SHAPES = {
    "cpu": ((1, 16, 512, 64), (4, 16, 512, 64), (1, 1, 512, 64)),
    "cuda": ((1, 64, 2048, 256), (8, 16, 2048, 256), (1, 1, 2048, 256)),
}
CHECKED = ((2, 3, 20, 5), (1, 1, 7, 1))
# chosen; fp32 rounds to some 1e-6, bf16 to a percent of outputs near 1
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Task:
    """One group of contenders; `shape` is (G, n, P, L)."""

    shape: tuple[int, ...]
    K: int
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"prefix_attention, {self.sizes}, {self.dtype}, {self.device}"

    @property
    def sizes(self) -> str:
        """The shape and the heads with their letters."""
        H, Hkv = HEADS[self.K]
        names = zip("GnPL", self.shape, strict=True)
        return " ".join(f"{k}={n}" for k, n in names) + f" H={H} Hkv={Hkv} K={self.K}"

    @property
    def flops(self) -> float:
        """Of two products of each query with each key of its row."""
        G, n, P, L = self.shape
        return 4.0 * self.K * HEADS[self.K][0] * G * n * (P + L)

    def inputs(self) -> tuple[Tensor, ...]:
        """Queries, keys and values of prefixes and of rows; logits of standard deviation 2."""
        torch.manual_seed(0)
        (G, n, P, L), (H, Hkv) = self.shape, HEADS[self.K]
        shapes = [(G * n, H, self.K)]
        shapes += [(G, Hkv, P, self.K)] * 2 + [(G * n, Hkv, L, self.K)] * 2
        q, *others = (torch.randn(shape, device=self.device) for shape in shapes)
        return tuple(x.to(getattr(torch, self.dtype)) for x in (2 * q, *others))

    def run(self, seconds: float) -> tuple[Results, Missing]:
        """Measure the contenders and the floor in turns."""
        G, n, *_ = self.shape
        q, *keys_and_values = self.inputs()
        rows = PrefixRows.of([n] * G, self.device)

        pk, pv, own_k, own_v = keys_and_values

        def copied() -> tuple[Tensor, Tensor]:
            k = torch.cat([pk.repeat_interleave(n, 0), own_k], dim=2)
            return k, torch.cat([pv.repeat_interleave(n, 0), own_v], dim=2)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

        k, v = copied()
        contenders = {
            "ours": Contender("ours", lambda: prefix_attention(q, pk, pv, own_k, own_v, rows)),
            "SDPA, copied before": Contender("exact", lambda: attend(q, k, v)),
            "SDPA, copies in the call": Contender("exact", lambda: attend(q, *copied())),
            "bare read": Contender("floor", lambda: [x.sum() for x in keys_and_values]),
        }
        truth = attend(q[:1].double(), k[:1].double(), v[:1].double())
        facts = machine(self.device)
        subject = Subject("prefix_attention", self.sizes, self.dtype, self.flops, facts)
        with torch.no_grad():
            return compare(subject, contenders, truth, self.device, seconds)


def main() -> None:
    """Parse the flags; check or measure."""
    parser = flags("decoding attention on a shared prefix", seconds=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, help="default: bfloat16 on a GPU")
    parser.add_argument("--K", type=int, choices=HEADS, help="one head size")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("G", "n", "P", "L"))
    args = parsed(parser)
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    shapes = (tuple(args.shape),) if args.shape else SHAPES[args.device]
    shapes = CHECKED if args.check else shapes
    sizes = HEADS if args.K is None else (args.K,)
    for task in steps([Task(shape, K, dtype, args.device) for K in sizes for shape in shapes]):
        results, missing = task.run(0.0 if args.check else args.seconds)
        rows = [row for row, _ in results.values()]
        print(table(str(task), rows, missing), flush=True)
        if args.check:
            assert not missing, missing
            errors = [row.max_error for row in rows if row.max_error is not None]
            assert len(errors) == 3, rows
            assert max(errors) <= TOLERANCE[dtype], rows
        if args.out:
            write(rows, args.out)


if __name__ == "__main__":
    main()
