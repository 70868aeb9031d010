"""Token statistics from hidden rows and the head, beside every peer.

    python -m bench.linear_logprob                # the tasks of `make bench` of this op
    python -m bench.linear_logprob --shape 2048 896 151936 --what forward --threads 2
    python -m bench.linear_logprob --check        # tiny, asserts agreement, no timing

Compute bound: 2 R V D operations forward, 6 R V D with both gradients. The floor is the bare
product in the inputs' dtype, and with gradients the three products that no backward can do without.
On a CPU the fp32 product is that of MKL and of oneDNN; without instructions for bf16 it is the
product of fp32 copies, several times faster.

R rows, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench._logprob import DTYPES, HEADS, K, Task, command
from bench.peers.finding import Call

COLUMNS = 8192  # of the vocabulary at a time, so that no fp64 copy of a head is held


class LinearTask(Task):
    """Of shape (rows, hidden, vocabulary)."""

    op = "linear_logprob"
    letters = "RDV"
    whats = ("forward", "statistics", "forward+backward")
    checked = (70, 40, 3000)

    @property
    def flops(self) -> float:
        """Of the products."""
        R, D, V = self.shape
        return 2.0 * R * D * V * (3 if self.what == "forward+backward" else 1)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden rows, a head, random targets."""
        torch.manual_seed(0)
        dtype, (R, D, V) = DTYPES[self.dtype], self.shape
        target = torch.randint(V, (R,), device=self.device)
        x = torch.randn(R, D, device=self.device)
        w = torch.randn(V, D, device=self.device) * 3 / D**0.5
        return x.to(dtype), w.to(dtype), target

    def floors(self) -> dict[str, Call]:
        """Bare products."""
        gemms = {"bare GEMM": _gemm}
        if self.device == "cpu" and torch.backends.mkldnn.is_available():
            if self.dtype == "float32":
                gemms = {"bare GEMM, MKL": _gemm, "bare GEMM, oneDNN": _onednn}
            elif not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                gemms = {"bare GEMM, fp32 copies": _wide}
        if self.what == "forward+backward":
            return {name: _three(gemm) for name, gemm in gemms.items()}
        return dict(gemms)

    def logits(self, tensors: Sequence[Tensor], rows: int) -> Tensor:
        """Some columns of the head at a time."""
        x, w = tensors[0][:rows].double(), tensors[1]
        return torch.cat([x @ part.double().T for part in w.split(COLUMNS)], dim=1)

    @classmethod
    def whole_run(cls, device: str) -> tuple[list[Task], list[Task]]:
        """Heads of real models, as many rows as the device is made for.

        On a CPU few rows, and one head that is narrower than its model's: under 15 minutes in all.
        On a GPU from 1 k to 64 k rows.
        """
        if device != "cuda":
            return _cpu_tasks("bfloat16"), _cpu_tasks("float32")
        hidden = [(8 * K, *head) for name, head in HEADS.items() if not name.startswith("Game")]
        wide, narrow = HEADS["Llama-3.1-8B"], HEADS["Qwen2.5-0.5B"]
        telling: list[Task] = [cls("forward", shape, "bfloat16", device) for shape in hidden]
        for what in ("statistics", "forward+backward"):
            for head in (wide, narrow):
                telling.append(cls(what, (8 * K, *head), "bfloat16", device))
        others: list[Task] = [
            cls("forward", (rows, *head), "bfloat16", device)
            for rows in (K, 64 * K)
            for head in (narrow, wide)
        ]
        return telling, [*others, cls("forward", (8 * K, *narrow), "float32", device)]


def _cpu_tasks(dtype: str) -> list[Task]:
    tasks: list[Task] = [
        LinearTask(what, shape, dtype, "cpu")
        for what in LinearTask.whats
        for shape in ((4 * K, *HEADS["Game of 24, ships here"]), (256, 896, 32_768))
    ]
    for name in ("Qwen2.5-0.5B", "Phi-3-mini"):
        tasks.append(LinearTask("forward", (64, *HEADS[name]), dtype, "cpu"))
    return tasks


def _gemm(a, b):
    return a @ b.T


def _onednn(a, b):
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _wide(a, b):
    return a.float() @ b.float().T


def _three(gemm: Call) -> Call:
    """The product of forward, and the two that no backward can do without."""

    def run(x, w):
        z = gemm(x, w)
        return z, gemm(z, w.T), gemm(z.T, x.T)

    return run


if __name__ == "__main__":
    command([LinearTask])
