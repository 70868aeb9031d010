"""Contenders must agree before their times mean anything: log-probs, gradients."""

from collections.abc import Mapping

from torch import Tensor, nn

from bench._sharing import Problem, truth

# chosen; rounding is some 1e-5 of either
TOLERANCE_NATS = 1e-3
TOLERANCE_GRADIENT = 1e-3

Gradients = dict[str, Tensor]


def errors(problem: Problem | None, found: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest error of each contender's log-probs, nats, against the model's own logits in fp64.

    Those are of some completions. Without a problem: of ours, against the contender that is not.
    All log-probs are compared between contenders.

    Raises:
        RuntimeError: If one is off.
    """
    peer = next(x for name, x in found.items() if not name.startswith("ours"))
    apart = {name: _distance(x, peer) for name, x in found.items()}
    if max(apart.values()) > TOLERANCE_NATS:
        raise RuntimeError(f"log-probs differ, nats: {apart}")
    if problem is None:
        return {name: error for name, error in apart.items() if found[name] is not peer}
    rows, want = truth(problem)
    got = {name: x.view(problem.N, problem.C)[rows] for name, x in found.items()}
    return {name: _distance(x.double(), want) for name, x in got.items()}


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.shape == b.shape else float("inf")


def gradients(model: nn.Module) -> Gradients:
    """Of every parameter, copied."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(found: Mapping[str, Gradients]) -> float:
    """The largest difference between two contenders, of the parameter's largest gradient.

    Raises:
        RuntimeError: If one is off.
    """
    first, *others = found.values()
    worst = max(
        ((other[name] - g).abs().max() / g.abs().max()).item()
        for other in others
        for name, g in first.items()
    )
    if not worst <= TOLERANCE_GRADIENT:
        raise RuntimeError(f"gradients differ by {worst:.1e} of the largest")
    if any(g.isnan().any() for g in first.values()):
        raise RuntimeError("gradients are NaN")
    return worst
