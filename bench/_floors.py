"""What no implementation can beat, measured in the same rounds, and the truth in fp64."""

import torch
from torch import Tensor

from bench._tasks import Task
from bench.peers.finding import Call

COLUMNS = 8192  # of the vocabulary at a time, so that no fp64 copy of a head is held


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


def floors_of(task: Task) -> dict[str, Call]:
    """Bare products in the inputs' dtype (fp32 on a CPU: by MKL and by oneDNN), or bare reads.

    On a CPU without instructions for bf16 the product of fp32 copies, several times faster.

    Each takes the task's tensors but the target.
    """
    backward = task.what == "forward+backward"
    if task.op == "token_logprob":
        if backward:
            return {"bare reads and write": lambda x: (x.sum(), x.clone())}
        return {"bare read": lambda x: x.sum()}
    gemms = {"bare GEMM": _gemm}
    if task.device == "cpu" and torch.backends.mkldnn.is_available():
        if task.dtype == "float32":
            gemms = {"bare GEMM, MKL": _gemm, "bare GEMM, oneDNN": _onednn}
        elif not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            gemms = {"bare GEMM, fp32 copies": _wide}
    return {name: _three(gemm) if backward else gemm for name, gemm in gemms.items()}


def true_logprob(tensors: tuple[Tensor, ...], target: Tensor, rows: int) -> Tensor:
    """fp64 log-probabilities of the first rows, on the CPU."""
    x = tensors[0][:rows].double()
    if len(tensors) == 1:
        z = x
    else:
        z = torch.cat([x @ part.double().T for part in tensors[1].split(COLUMNS)], dim=1)
    return z.log_softmax(1).gather(1, target[:rows, None])[:, 0].cpu()
