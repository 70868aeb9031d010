"""A case made into tensors for an op, with the truth in fp64."""

import dataclasses

import torch
from torch import Tensor

from bench._cases import Case
from bench._layouts import laid_out

D = 128  # a width that every peer takes
IGNORED = -100


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
