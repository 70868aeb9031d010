"""Whether two ways of computing the same log-probs agree, up to rounding.

In fp32 right ways agree to 2e-5 nats and wrong ones are off by 0.1 and more. In half precision
rounding alone changes a log-prob by as much, differently in each model; there the measure is what
one more rounding of the embeddings changes. Over 21 kinds of tiny models in bf16, right ways were
off by at most 0.7 times that (root mean square), wrong ones by at least 2.9 times.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import transformers

TOLERANCE_NATS = 1e-4
NOISE_FACTOR = 8  # of what a batch, or a cache of transformers' own, changes
SHAKEN_FACTOR = 1.5
SHAKES = 8


class Truth:
    """Log-probs of each sequence alone, and how far rounding may move them.

    Args:
        model: What they are of.
        run: Computes them, in any shape, each sequence alone.
    """

    def __init__(self, model: "transformers.PreTrainedModel", run: Callable[[], Tensor]):
        self.values = run()
        self.limit = TOLERANCE_NATS
        self.shaken = 0.0
        dtype = _working_dtype(model)
        if torch.finfo(dtype).bits < 32:
            self.shaken = _shaken(model, run, self.values, torch.finfo(dtype).eps)

    def allow(self, other: Tensor) -> None:
        """Let others be as far off as `other`, `NOISE_FACTOR` times."""
        self.limit = max(self.limit, NOISE_FACTOR * _difference(other, self.values).max().item())

    def fault(self, got: Tensor) -> str | None:
        """How `got` disagrees, in words; None if it does not."""
        off = _difference(got, self.values)
        if (worst := off.max().item()) <= self.limit:
            return None
        mean, limit = _rms(off), SHAKEN_FACTOR * self.shaken
        if mean <= limit:
            return None
        if limit:
            return f"off by {mean:.1e} nats (root mean square), more than {limit:.1e}"
        return f"off by {worst:.1e} nats, more than {self.limit:.1e}"


def _working_dtype(model: "transformers.PreTrainedModel") -> torch.dtype:
    """What its products are computed in."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.dtype


def _shaken(
    model: "transformers.PreTrainedModel", run: Callable[[], Tensor], values: Tensor, eps: float
) -> float:
    """Root mean square of what one more rounding of the embeddings, to `eps`, changes."""
    generator = torch.Generator().manual_seed(0)

    def shake(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        sign = torch.randint(0, 2, out.shape, generator=generator).to(out.device) * 2 - 1
        # a little more than half of the last place, so that it is not rounded back
        return (out.float() * (1 + 0.51 * eps * sign)).to(out.dtype)

    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    handle = embeddings.register_forward_hook(shake)
    try:
        return _rms(torch.stack([_difference(run(), values) for _ in range(SHAKES)]))
    finally:
        handle.remove()


def _difference(got: Tensor, want: Tensor) -> Tensor:
    """In nats; NaN on one side only is the worst of errors."""
    same = (got == want) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, (got - want).abs().float()).nan_to_num(nan=float("inf"))


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
