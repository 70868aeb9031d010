"""Tasks of sharing on a GPU: who takes part, measured in turns, and judged."""

import copy
import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bench._measure import Timing, measure
from bench._sharing import by_padded_batch
from bench._sharing_agreement import check_gradients, gradients
from bench._sharing_gpu_sampling import sampling_calls
from bench._sharing_gpu_ways import (
    ALONE,
    Calls,
    Setting,
    backward_calls,
    forward_calls,
    setting,
)
from bench._sharing_models import Prompted
from bench.peers.finding import Missing

What = Literal["forward", "forward+backward", "sampling"]
MIN_ROUNDS = 3  # a padded batch of the larger model takes seconds
TRUE_ROWS = 2  # completions that are scored in fp32


class Errors(NamedTuple):
    """Of log-probs, nats."""

    mean: float
    most: float


class Found(NamedTuple):
    """What came of one task."""

    timings: dict[str, Timing]
    missing: Missing
    errors: dict[str, Errors]
    returned: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Task:
    """One group of contenders."""

    what: What
    problem: Prompted
    part: int  # tokens that whole sequences go in
    temperature: float = 1.0
    alone: bool = True  # ours without sharing takes part: as long as a padded batch

    def __str__(self) -> str:
        return f"sharing {self.what}, {self.problem}"

    def run(self, device: str, dtype: torch.dtype, seconds: float) -> Found:
        """Measure the contenders; one that fails is named."""
        at = setting(self.problem, device, dtype, self.part)
        if self.what == "sampling":
            calls = sampling_calls(at, self.temperature)
        else:
            calls = forward_calls(at) if self.what == "forward" else backward_calls(at)
            if not self.alone:
                calls.pop(ALONE, None)
        last: dict[str, Tensor] = {}

        def call(name: str) -> Tensor:
            last[name] = calls[name]()
            return last[name]

        kept: Calls = {name: lambda name=name: call(name) for name in calls}
        timings, missing = measure(kept, device, seconds, MIN_ROUNDS)
        last = {name: last[name].detach().cpu() for name in timings}
        at.plain.zero_grad()
        if self.what == "sampling":
            return Found(timings, missing, {}, last)
        rows, want = _truth(at)
        found = {name: x.view(self.problem.N, -1)[rows] for name, x in last.items()}
        return Found(timings, missing, {n: _errors(x, want) for n, x in found.items()}, last)

    def gradient_error(self, device: str, dtype: torch.dtype) -> float:
        """How far the contenders' gradients are apart, of the largest.

        Raises:
            RuntimeError: If one is off.
        """
        at = setting(self.problem, device, dtype, self.part)
        found = {}
        for name, call in backward_calls(at).items():
            call()
            # the models share their parameters, and so their gradients
            found[name] = gradients(at.plain)
        at.plain.zero_grad()
        return check_gradients(found)


def _truth(at: Setting) -> tuple[Tensor, Tensor]:
    """Some completions, and their log-probs [rows, C] by the model in fp32, on the CPU."""
    rows = torch.linspace(0, at.problem.N - 1, min(at.problem.N, TRUE_ROWS)).long()
    wide = copy.deepcopy(at.plain).float()
    with torch.no_grad():
        found = [by_padded_batch(wide, at.prompt, at.completions[row][None]) for row in rows]
    return rows, torch.stack(found).cpu()


def _errors(got: Tensor, want: Tensor) -> Errors:
    off = (got.float() - want).abs()
    return Errors(off.mean().item(), off.max().item())
