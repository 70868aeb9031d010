"""What an implementation made of a case: right, wrong, NaN or an exception."""

import warnings

import numpy as np
import torch
from torch import Tensor

from bench._cases import Case
from bench._problems import Problem, build, gradients
from bench.peers.finding import Peer, reason

ABSOLUTE, RELATIVE = 1e-4, 1e-6  # of nats, of the largest logit: fp32's rounding and to spare

TF32 = 50  # times as much on a GPU, where Triton's fp32 products keep 10 bits unless told otherwise


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
    return max(case.tolerance, ABSOLUTE + RELATIVE * finite)


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
