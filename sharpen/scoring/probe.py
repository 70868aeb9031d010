"""Whether two ways of computing the same log-probs agree, up to rounding.

In fp32 right ways agree to 2e-5 nats and wrong ones are off by 0.1 and more. In half precision
rounding alone changes a log-prob by as much, differently in each model; there the measure is what
one more rounding of the embeddings changes. Over 21 kinds of tiny models in bf16, right ways were
off by at most 0.7 times that (root mean square), wrong ones by at least 2.9 times.

Once per model: does hidden row x head give the model's own logits, and read how?

The hidden route never calls the model's head; it reads weight, bias, scale and cap and does the
arithmetic itself. A model may do more (an adapter on the head, a norm before it, a scale under an
unknown name), so the arithmetic is compared with `model(ids).logits` on a few random tokens. If no
reading agrees, the caller takes the logits route: slower, and right by construction.

Once per model: which way of sharing a prompt gives the scores of each sequence alone?

No list of model types can tell: a recurrent layer, a position that does not come from
`position_ids` or a mask that a model makes itself all give wrong scores in silence. So each way of
`predicting` is tried on a few random tokens and compared with the sequences alone (`agreement`).

How a model is scored: what reads its head, and how completions share their prompt.

Both are found by running the model on a few random tokens, said once in the log.

Statistics of pairs by the route of a model, and whole where a call cannot go by it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from sharpen.errors import InputError
from sharpen.models import ModelLimits
from sharpen_kernels import TokenStats
from sharpen_kernels.linear_logprob import Statistic

from .hooks import SharingError, install, uninstall
from .model_access import Head, evaluating, hidden_states, input_device, output_layer, readings
from .pairs import Pair
from .token_stats import WAYS, Sharing, any_shared, token_stats

if TYPE_CHECKING:
    import transformers

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


@dataclass(frozen=True)
class Choice:
    """The way found, and why in words."""

    sharing: Sharing
    reason: str


def find_sharing(
    model: "transformers.PreTrainedModel", head: Head | None, ways: Sequence[Sharing] = WAYS
) -> Choice:
    """The first of `ways` that scores a few random sequences as each alone scores.

    Runs in eval mode without gradients. Leaves the hooks of tree attention in the model if that
    is the way, and no other trace.
    """
    with torch.no_grad(), evaluating(model):
        pairs = _probe_pairs(model)
        truth = Truth(
            model, lambda: torch.cat([_logprobs(model, [pair], head, "none") for pair in pairs])
        )
        truth.allow(_logprobs(model, pairs, head, "none"))
        refused = []
        for way in ways:
            if way == "none":
                break
            reason = _try(model, pairs, head, way, truth)
            if reason is None:
                return Choice(way, "; ".join(["it scores as each sequence alone", *refused]))
            refused.append(f"{way}: {reason}")
    return Choice("none", "; ".join(refused) or "it was asked for")


def _try(
    model: "transformers.PreTrainedModel",
    pairs: list[Pair],
    head: Head | None,
    way: Sharing,
    truth: Truth,
) -> str | None:
    """Why `way` does not do for this model, or None."""
    if way == "tree":
        why = install(model)
        if why is not None:
            return why
    try:
        why = truth.fault(_logprobs(model, pairs, head, way))
    # a model may fail in any way at what it was not made for; the reason is logged
    except Exception as failure:
        why = (
            str(failure).splitlines()[0]
            if isinstance(failure, SharingError)
            else (f"{type(failure).__name__}: {failure}".splitlines()[0])
        )
    if why is not None and way == "tree":
        uninstall(model)
    return why


def _probe_pairs(model: "transformers.PreTrainedModel") -> list[Pair]:
    """Two prompts; completions of unequal lengths, two of them with an opening in common."""
    limits = ModelLimits.of(model)
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(limits.vocab_size, (n,), generator=generator).tolist()

    room = 64 if limits.max_length is None else min(64, limits.max_length)
    prompt, opening = ids(room // 2), ids(room // 6)
    endings = [ids(n) for n in (room // 3, 1, room // 8)]
    pairs = [(prompt, opening + ending) for ending in endings[1:]]
    pairs += [(prompt, endings[0]), (ids(room // 4), ids(2))]
    return [(p, c) for p, c in pairs if p and c]


def _logprobs(
    model: "transformers.PreTrainedModel", pairs: list[Pair], head: Head | None, way: Sharing
) -> Float32[Tensor, " S"]:
    found = token_stats(model, pairs, head=head, max_tokens=2**14, stats=("logprob",), sharing=way)
    assert found.logprob is not None
    return found.logprob.float()


logger = logging.getLogger(__name__)


class Route(NamedTuple):
    """How a model is scored.

    Attributes:
        sharing: "tree", "cache" or "none": how completions share their prompt.
        head: "hidden" projects hidden rows in `linear_logprob`. "logits" lets the model compute
            the logits of one small batch at a time: slower, as exact as its own arithmetic.
    """

    sharing: Sharing
    head: Literal["hidden", "logits"]


def find_route(model: "transformers.PreTrainedModel", sharing: str) -> tuple[Route, Head | None]:
    """The route of `model`, and how to read its head where that is "hidden".

    Raises:
        InputError: If the model is not causal, or does not score right when it shares as asked.
    """
    # odd shapes, tried once, are not worth graphs of a model that is compiled
    with torch.compiler.set_stance("force_eager"):
        return _find_route(model, sharing)


def take_route(model: "transformers.PreTrainedModel", route: Route) -> None:
    """Prepare `model` for the route that was found for its like elsewhere."""
    if route.sharing == "tree":
        why = install(model)
        assert why is None, why


def bounded_way(model: "transformers.PreTrainedModel", route: Route, head: Head | None) -> Sharing:
    """How its gradients are gathered in bounded memory.

    A prompt's graph can wait behind a cache, where the model scores right from one.
    """
    if route.sharing != "tree":
        return route.sharing
    with torch.compiler.set_stance("force_eager"):
        return find_sharing(model, head, ["cache"]).sharing


def _find_route(model: "transformers.PreTrainedModel", sharing: str) -> tuple[Route, Head | None]:
    name = type(model).__name__
    finding = find_head(model)
    if finding.head is None:
        logger.warning("%s takes the slower logits route: %s.", name, finding.reason)
    else:
        logger.info("%s takes the hidden route: %s.", name, finding.reason)
    choice = find_sharing(model, finding.head, [way for way in WAYS if sharing in ("auto", way)])
    if sharing not in ("auto", choice.sharing):
        raise InputError(
            f"`sharing` must be one that scores {name} right, got {sharing!r} "
            f"({choice.reason}); leave it at 'auto'."
        )
    logger.info("%s shares prompts by %r: %s.", name, choice.sharing, choice.reason)
    return Route(choice.sharing, "logits" if finding.head is None else "hidden"), finding.head


def routed_stats(
    model: "transformers.PreTrainedModel",
    pairs: list[Pair],
    stats: Sequence[Statistic],
    *,
    route: tuple[Route, Head | None],
    max_tokens: int,
    sharing: str = "auto",
    temperature: float = 1.0,
) -> TokenStats:
    """`token_stats` of all completion tokens of `pairs`, end to end; differentiable.

    Args:
        model: Run in the mode it is in.
        pairs: Prompt and completion ids; the prompt has at least one.
        stats: Which statistics.
        route: What `find_route` found of `model`.
        max_tokens: Budget of one batch, in tokens.
        sharing: What was asked for; with "auto", pairs that share nothing are read whole.
        temperature: Divides the model's logits.
    """
    found, head = route
    options = {"head": head, "max_tokens": max_tokens, "temperature": temperature}
    run = partial(token_stats, model, pairs, stats=stats, **options)
    whole = sharing == "auto" and not any_shared(pairs)
    try:
        return run(sharing="none" if whole else found.sharing)
    except SharingError as error:
        # not met by the probe: dropout, checkpointing, a layer that long inputs alone reach
        logger.warning("whole sequences instead of shared prompts: %s", error)
        return run(sharing="none")
