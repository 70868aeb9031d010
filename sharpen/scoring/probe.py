"""Once per model: does hidden row x head give the model's own logits, and read how?

The hidden route never calls the model's head; it reads weight, bias, scale and cap and does the
arithmetic itself. A model may do more (an adapter on the head, a norm before it, a scale under an
unknown name), so the arithmetic is compared with `model(ids).logits` on a few random tokens. If no
reading agrees, the caller takes the logits route: slower, and right by construction.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sharpen.errors import InputError
from sharpen.limits import ModelLimits

from .forward import evaluating, hidden_states, input_device
from .head import Head, output_layer, readings

if TYPE_CHECKING:
    import transformers

N_TOKENS = 8
N_TARGETS = 16  # per row; chosen
N_DRAWS = 4  # a draw that meets a NaN weight says nothing, so another is tried
TOLERANCE_NATS = 1e-4  # chosen: fp32 agrees to about 1e-6, a missing scale or cap errs by 1e-2

# what fp32 products round to where a global setting of PyTorch lets them
STEPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}


@dataclass(frozen=True)
class Finding:
    """What the probe found: the head to use, or None, and why in words."""

    head: Head | None
    reason: str


def find_head(model: "transformers.PreTrainedModel") -> Finding:
    """The reading of the configuration that gives the logits of `model`, by trying each.

    Runs in eval mode without gradients and leaves no trace; a few forwards of 8 tokens.

    Raises:
        InputError: If the model is not causal: a token changes the logits before it.
    """
    with torch.no_grad(), evaluating(model):
        for seed in range(N_DRAWS):
            ids = _random_ids(model, seed)
            logits_RV = model(input_ids=ids).logits[0]
            known_R = ~logits_RV.isnan().any(dim=1)
            if known_R.any():
                break
        else:
            return Finding(None, "it returns NaN for every token tried")
        _check_causal(model, ids, logits_RV)
        linear = output_layer(model)
        if linear is None:
            return Finding(None, "its head is not one plain linear layer")
        hidden_RD = hidden_states(model, ids)
        if hidden_RD is None or hidden_RD.shape != (1, N_TOKENS, linear.in_features):
            return Finding(None, "its backbone does not return the rows that the head takes")
        return _best_reading(model, hidden_RD[0][known_R], logits_RV[known_R])


def _check_causal(
    model: "transformers.PreTrainedModel", ids: Int64[Tensor, "1 R"], logits: Float[Tensor, "R V"]
) -> None:
    half = N_TOKENS // 2
    early_RV = model(input_ids=ids[:, :half]).logits[0].float()
    late_RV = logits[:half].float()
    difference_RV = (early_RV.log_softmax(dim=1) - late_RV.log_softmax(dim=1)).abs()
    # the median: in half precision a router may send single tokens elsewhere
    typical = difference_RV.nanmedian().item()
    if typical > _tolerance(logits):
        raise InputError(
            f"`model` must be causal, got {type(model).__name__}, in which later tokens change "
            f"the log-probs of earlier ones by {typical:.1e} nats; load it as a decoder."
        )


def _best_reading(
    model: "transformers.PreTrainedModel",
    hidden: Float[Tensor, "R D"],
    logits: Float[Tensor, "R V"],
) -> Finding:
    generator = torch.Generator().manual_seed(0)
    R, V = logits.shape
    target_RK = torch.randint(V, (R, N_TARGETS), generator=generator).to(logits.device)
    target_RK[:, 0] = logits.argmax(dim=1)
    rows_S = torch.arange(R, device=logits.device).repeat_interleave(N_TARGETS)
    want_S = logits.float().log_softmax(dim=1).gather(1, target_RK).flatten()
    errors = {
        head: _error(model, head, hidden, target_RK.flatten(), rows_S, want_S)
        for head in readings(model.config)
    }
    best = min(errors, key=errors.__getitem__)
    if errors[best] <= _tolerance(logits):
        return Finding(best, f"hidden rows give its logits to {errors[best]:.1e} nats")
    return Finding(None, f"its logits are {errors[best]:.1e} nats away from those of its head")


def _error(
    model: "transformers.PreTrainedModel",
    head: Head,
    hidden: Float[Tensor, "R D"],
    target: Int64[Tensor, " S"],
    rows: Int64[Tensor, " S"],
    want: Float32[Tensor, " S"],
) -> float:
    got_S = head.token_stats(model, hidden, target, rows=rows).logprob
    assert got_S is not None
    got_S = got_S.to(want)
    # equal covers -inf on both sides; NaN on one side only is the worst of errors
    difference_S = torch.where(got_S == want, 0.0, (got_S - want).abs())
    return difference_S.nan_to_num(nan=float("inf")).max().item()


def _tolerance(logits: Float[Tensor, "R V"]) -> float:
    """Rounding that the model's own logits carry: a few steps of the type they are made in."""
    # modules to type checkers, objects with more inside
    backends: Any = torch.backends
    backend = backends.cuda.matmul if logits.is_cuda else backends.mkldnn.matmul
    step = max(torch.finfo(logits.dtype).eps, STEPS.get(backend.fp32_precision, 0.0))
    largest = logits.float().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return max(TOLERANCE_NATS, 4 * step * largest)


def _random_ids(model: "transformers.PreTrainedModel", seed: int) -> Int64[Tensor, "1 N_TOKENS"]:
    V = ModelLimits.of(model).vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (1, N_TOKENS), generator=generator).to(input_device(model))
