"""Token statistics from logits, beside every peer.

    python -m bench.token_logprob                 # the tasks of `make bench` of this op
    python -m bench.token_logprob --shape 64 151936 --what entropy --dtype float32
    python -m bench.token_logprob --check         # tiny, asserts agreement, no timing

Memory bound: R V elements are read once, and with gradients as many are written. The floor is one
read of the logits (their sum) and, with gradients, a read and a copy. Two operations a logit are
counted: an exponential and a sum.

R rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench._logprob import DTYPES, K, Task, command
from bench.peers.finding import Call


class TokenTask(Task):
    """Of shape (rows, vocabulary)."""

    op = "token_logprob"
    letters = "RV"
    whats = ("forward", "entropy", "forward+backward")
    checked = (70, 3000)

    @property
    def flops(self) -> float:
        """An exponential and a sum a logit."""
        return 2.0 * self.shape[0] * self.shape[1]

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Logits and random targets."""
        torch.manual_seed(0)
        R, V = self.shape
        target = torch.randint(V, (R,), device=self.device)
        return (3 * torch.randn(R, V, device=self.device)).to(DTYPES[self.dtype]), target

    def floors(self) -> dict[str, Call]:
        """Bare reads."""
        if self.what == "forward+backward":
            return {"bare reads and write": lambda z: (z.sum(), z.clone())}
        return {"bare read": lambda z: z.sum()}

    def logits(self, tensors: Sequence[Tensor], rows: int) -> Tensor:
        """The inputs themselves."""
        return tensors[0][:rows].double()

    @classmethod
    def whole_run(cls, device: str) -> tuple[list[Task], list[Task]]:
        """Vocabularies of real models, as many rows as the device is made for."""

        def tasks(shapes: Sequence[tuple[int, int]], dtype: str) -> list[Task]:
            return [cls(what, shape, dtype, device) for what in cls.whats for shape in shapes]

        if device != "cuda":
            shapes = (4 * K, 204), (64, 151_936)
            return tasks(shapes, "bfloat16"), tasks(shapes, "float32")
        telling = tasks(((4 * K, 151_936), (16 * K, 32_768)), "bfloat16")
        return telling, [cls("forward", (4 * K, 151_936), "float32", device)]


if __name__ == "__main__":
    command([TokenTask])
