"""How close is close enough: a result is judged beside PyTorch, both against fp64."""

import torch
from torch import Tensor

from sharpen_kernels.linear_logprob import linear_logprob, linear_logprob_reference
from sharpen_kernels.stats import DIFFERENTIABLE, NAMES

LEAVES = ("hidden", "weight", "bias")
# units in the last place of 1, or of the largest value: PyTorch's own error on a few rows is luck
# where a sum enters squared or to a power, and a margin has the errors of logits larger than itself
FLOOR_ULPS = {"sum_p2": 4, "varentropy": 4, "renyi": 4, "margin": 8}


def assert_as_accurate(
    name: str,
    got: Tensor,
    torch_low: Tensor,
    truth: Tensor,
    floor: float | None = None,
    *,
    ulps: float = 1,
):
    """Fail if `got` is further from `truth` (fp64) than twice `torch_low` is, plus `floor`.

    The floor defaults to `ulps` units in the last place of `got` at the largest value of `truth`,
    or at 1 where that is larger. What is infinite, NaN or an id must be the same.
    """
    if truth.dtype == torch.int64:
        assert torch.equal(got, truth), name
        return
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)} != {tuple(truth.shape)}"
    special = ~truth.isfinite()
    torch.testing.assert_close(
        got[special].double(), truth[special], rtol=0, atol=0, equal_nan=True, msg=name
    )
    got, torch_low, truth = (x[~special] for x in (got, torch_low, truth))
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} non-finite values"
    if truth.numel() == 0:
        return
    if floor is None:
        ulp = torch.finfo(got.dtype).eps * max(1.0, truth.abs().max().item())
        floor = FLOOR_ULPS.get(name, 1) * ulps * ulp
    ours = (got.double() - truth).abs().max().item()
    theirs = (torch_low.double() - truth).abs().max().item()
    assert ours <= 2 * theirs + floor, (
        f"{name}: max error {ours:.2e} > 2 x {theirs:.2e} + {floor:.1e}"
    )


def has_nothing(x: Tensor) -> list[bool]:
    """Of each token, whether its statistic says that there is none: NaN, or an id of -1."""
    nothing = x.isnan() if x.is_floating_point() else x == -1
    return nothing.reshape(len(x), -1).all(dim=1).tolist()


def assert_same_ids(got: Tensor, truth: Tensor, topk: Tensor):
    """Fail unless `got` [S, k] are the ids of `truth`, but for logits too near for fp32 to tell.

    `topk` [S, k] are the true log-probabilities of `truth`.
    """
    far = torch.finfo(torch.float32).eps * 8
    for row, ids in zip(*(got != truth).nonzero(as_tuple=True), strict=True):
        mine = truth[row] == got[row, ids]
        # past the last one of the list it can only have been about as likely as that
        value = topk[row][mine] if mine.any() else topk[row, -1]
        assert (value - topk[row, ids]).abs() <= far * max(1.0, topk[row, ids].abs().item())


def head_problem(R, V, D, *, S=None, dtype=torch.float32, device="cpu", bias=False):
    """Arguments of a call: logits of standard deviation 3, as trained models have; S pairs."""
    hidden = torch.randn(R, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) * 3 / max(D, 1) ** 0.5).to(dtype)
    return {
        "hidden": hidden,
        "weight": weight,
        "target": torch.randint(V, (R if S is None else S,), device=device),
        "rows": None if S is None else torch.randint(R, (S,), device=device),
        "bias": torch.randn(V, device=device).to(dtype) if bias else None,
    }


def values(problem, stats=NAMES, *, fn=linear_logprob, **options):
    """The tensors of `stats`, by name; no other field is set."""
    found = vars(fn(**problem, stats=stats, **options))
    assert {name for name, x in found.items() if x is not None} == set(stats)
    return {name: found[name] for name in stats}


def values_and_gradients(fn, problem, stats=NAMES, dtype=None, **options):
    """Values of `stats`, and gradients of their randomly weighted sum, by name."""
    problem = dict(problem)
    for name in LEAVES:
        x = problem[name]
        if x is not None:
            problem[name] = x.detach().to(dtype or x.dtype).requires_grad_()
    out = values(problem, stats, fn=fn, **options)
    given = {f"d{name}": problem[name] for name in LEAVES if problem[name] is not None}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), device=problem["hidden"].device, dtype=torch.float64)
    for name in stats:
        weight = torch.randn(out[name].shape, generator=generator).to(loss.device)
        if name in DIFFERENTIABLE:
            loss = loss + (out[name] * weight.to(out[name].dtype)).sum()
    if loss.requires_grad:
        out |= dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True))
    return {name: x.detach() for name, x in out.items()}


def assert_matches_fp64(problem, stats=NAMES, *, ulps=1, **options):
    """Every value and gradient is as close to fp64 as PyTorch's own fp32, within a factor of 2.

    `ulps` raises the floor, for so few values that PyTorch's error is luck.
    """
    got = values_and_gradients(linear_logprob, problem, stats, **options)
    low = values_and_gradients(linear_logprob_reference, problem, stats, torch.float32, **options)
    truth = values_and_gradients(linear_logprob_reference, problem, stats, torch.float64, **options)
    assert set(got) == set(truth)
    for name, x in got.items():
        if name == "topk_id" and "topk" in truth:
            assert_same_ids(x, truth[name], truth["topk"])
        else:
            assert_as_accurate(name, x, low[name], truth[name], ulps=ulps)
    return got
