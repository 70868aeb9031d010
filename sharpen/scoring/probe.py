"""How a model is scored, found by trying it once on a few random tokens, and said in the log.

1. `find_head`: does hidden row x head give the model's own logits, and read how? The hidden route
   never calls the model's head; it reads weight, bias, scale and cap and does the arithmetic
   itself. A model may do more (an adapter on the head, a norm before it, a scale under an unknown
   name), so the arithmetic is compared with `model(ids).logits`. If no candidate agrees, the model
   takes the logits route: slower, and right by construction.
2. `find_sharing`: which way of sharing a prompt gives the scores of each sequence alone? No list of
   model types can tell: a recurrent layer, a position that does not come from `position_ids` or a
   mask that a model makes itself all give wrong scores in silence. So each way is tried.

Scores agree up to rounding (`ReferenceScores`). In fp32 right ways agree to 2e-5 nats and wrong
ones are off by 0.1 and more. In half precision rounding alone changes a log-prob by as much,
differently in each model; there the measure is what one more rounding of the embeddings changes.
Over 21 kinds of tiny models in bf16, right ways were off by at most 0.7 times that (root mean
square), wrong ones by at least 2.9 times.

R tokens of the probe, K targets of each, S scored tokens, D hidden, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from sharpen.errors import InputError
from sharpen.models import ModelLimits

from .batching import PredictorBatch
from .hooks import SharingError, install, is_installed, uninstall
from .model_access import (
    Head,
    candidate_heads,
    evaluating,
    hidden_states,
    input_device,
    output_layer,
)
from .pairs import Pair
from .token_stats import WAYS, HiddenPath, ScoringPath, Sharing, scoring_path, token_stats

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

N_TOKENS = 8
N_TARGETS = 16  # per row; chosen
N_DRAWS = 4  # a draw that meets a NaN weight says nothing, so another is tried
TOLERANCE_NATS = 1e-4  # chosen: fp32 agrees to about 1e-6, a missing scale or cap errs by 1e-2

NOISE_FACTOR = 8  # of what a batch, or a cache of transformers' own, changes
PERTURBATION_FACTOR = 1.5
# of a batch: in fp32, where products may be rounded to bf16, and times what one more rounding
# changes. Both are chosen between what right models do and the least of wrong ones, 0.1 and 2.9
LEAK_NATS = 0.03
LEAK_FACTOR = 2.5
N_PERTURBATIONS = 8

# what fp32 products round to where a global setting of PyTorch lets them
STEPS = {"tf32": 2.0**-10, "bf16": 2.0**-7}


class Route(NamedTuple):
    """How a model is scored.

    Attributes:
        sharing: "tree", "cache" or "none": how completions share their prompt. "alone" for a model
            in which a batch changes its rows (experts of limited capacity, statistics of the
            batch): it reads one sequence at a time.
        head: "hidden" projects hidden rows in `linear_logprob`. "logits" lets the model compute
            the logits of one small batch at a time: slower, as exact as its own arithmetic.
    """

    sharing: Sharing
    head: Literal["hidden", "logits"]


def probe_model(model: "transformers.PreTrainedModel", sharing: str) -> tuple[Route, Head | None]:
    """The route of `model`, and how to read its head where that is "hidden".

    Raises:
        InputError: If the model is not causal, or does not score right when it shares as asked.
    """
    name = type(model).__name__
    # odd shapes, tried once, are not worth graphs of a model that is compiled
    with torch.compiler.set_stance("force_eager"):
        head, why = find_head(model)
        if head is None:
            logger.warning("%s takes the slower logits route: %s.", name, why)
        else:
            logger.info("%s takes the hidden route: %s.", name, why)
        path = scoring_path(model, head)
        leak = find_leak(path)
        ways: list[Sharing] = [way for way in WAYS if sharing in ("auto", way)]
        found, why = ("alone", leak) if leak is not None else find_sharing(path, ways)
    if leak is not None and sharing in ("auto", "none"):
        logger.warning("%s reads one sequence at a time: %s.", name, leak)
        sharing = "auto"
    if sharing not in ("auto", found):
        raise InputError(
            f"`sharing` must be one that scores {name} right, got {sharing!r} "
            f"({why}); leave it at 'auto'."
        )
    logger.info("%s shares prompts by %r: %s.", name, found, why)
    return Route(found, "logits" if head is None else "hidden"), head


def apply_route(model: "transformers.PreTrainedModel", route: Route) -> None:
    """Prepare `model` for the route that was found for its like elsewhere."""
    if route.sharing == "tree":
        why = install(model)
        assert why is None, why


def gradient_sharing(path: ScoringPath, route: Route) -> Sharing:
    """How gradients are gathered in bounded memory.

    A prompt's graph can wait behind a cache, where the model scores right from one.
    """
    if route.sharing != "tree":
        return route.sharing
    with torch.compiler.set_stance("force_eager"):
        return find_sharing(path, ["cache"])[0]


def find_head(model: "transformers.PreTrainedModel") -> tuple[Head | None, str]:
    """The meaning of the configuration that gives the logits of `model`, or None; why in words.

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
            return None, "it returns NaN for every token tried"
        _check_causal(model, ids, logits_RV)
        linear = output_layer(model)
        if linear is None:
            return None, "its head is not one plain linear layer"
        hidden_RD = hidden_states(model, ids)
        if hidden_RD is None or hidden_RD.shape != (1, N_TOKENS, linear.in_features):
            return None, "its backbone does not return the rows that the head takes"
        return _best_head(model, hidden_RD[0][known_R], logits_RV[known_R])


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


def _best_head(
    model: "transformers.PreTrainedModel",
    hidden: Float[Tensor, "R D"],
    logits: Float[Tensor, "R V"],
) -> tuple[Head | None, str]:
    generator = torch.Generator().manual_seed(0)
    R, V = logits.shape
    target_RK = torch.randint(V, (R, N_TARGETS), generator=generator).to(logits.device)
    target_RK[:, 0] = logits.argmax(dim=1)
    want_S = logits.float().log_softmax(dim=1).gather(1, target_RK).flatten()
    rows_S = torch.arange(R, device=logits.device).repeat_interleave(N_TARGETS)
    batch = PredictorBatch(hidden, rows_S, target_RK.flatten(), torch.arange(R * N_TARGETS))

    def error(head: Head) -> float:
        got_S = HiddenPath(model, head).stats(batch, ("logprob",)).logprob
        assert got_S is not None
        return _difference(got_S.to(want_S), want_S).max().item()

    errors = {head: error(head) for head in candidate_heads(model.config)}
    best = min(errors, key=errors.__getitem__)
    if errors[best] <= _tolerance(logits):
        return best, f"hidden rows give its logits to {errors[best]:.1e} nats"
    return None, f"its logits are {errors[best]:.1e} nats away from those of its head"


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


def find_leak(path: ScoringPath) -> str | None:
    """How a batch changes the scores of its sequences, in words; None if by rounding alone.

    Runs in eval mode without gradients and leaves no trace.
    """
    with torch.no_grad(), evaluating(path.model):
        pairs = _probe_pairs(path.model)
        reference = ReferenceScores(path.model, lambda: _one_by_one(path, pairs))
        off = reference.leak(_logprobs(path, pairs, "none"))
    return None if off is None else f"a batch changes the log-probs of its rows by {off:.1e} nats"


def _one_by_one(path: ScoringPath, pairs: list[Pair]) -> Float32[Tensor, " S"]:
    return torch.cat([_logprobs(path, [pair], "none") for pair in pairs])


def find_sharing(path: ScoringPath, ways: Sequence[Sharing] = WAYS) -> tuple[Sharing, str]:
    """The first of `ways` that scores a few random sequences as each alone scores; why in words.

    Runs in eval mode without gradients. Leaves the hooks of tree attention in the model if that
    is the way, and no other trace.
    """
    with torch.no_grad(), evaluating(path.model):
        pairs = _probe_pairs(path.model)
        reference = ReferenceScores(path.model, lambda: _one_by_one(path, pairs))
        reference.allow(_logprobs(path, pairs, "none"))
        rejected = []
        for way in ways:
            if way == "none":
                break
            why = try_route(
                path.model,
                lambda way=way: reference.mismatch(_logprobs(path, pairs, way)),
                needs_hooks=way == "tree",
            )
            if why is None:
                return way, "; ".join(["it scores as each sequence alone", *rejected])
            rejected.append(f"{way}: {why}")
    return "none", "; ".join(rejected) or "it was asked for"


def try_route(
    model: "transformers.PreTrainedModel",
    attempt: Callable[[], str | None],
    *,
    needs_hooks: bool = True,
) -> str | None:
    """Why a way of running `model` does not do, in words of one line; None if it does.

    Args:
        model: Gets the hooks of `hooks.py`, and keeps them if the way does.
        attempt: Tries it, and says what is wrong, by its answer or by any exception: a model may
            fail in any way at what it was not made for.
        needs_hooks: Whether the hooks are needed at all.
    """
    had_hooks = is_installed(model)
    why = install(model) if needs_hooks else None
    if why is None:
        try:
            why = attempt()
        # the reason is logged
        except Exception as failure:
            kind = "" if isinstance(failure, SharingError) else f"{type(failure).__name__}: "
            why = kind + (str(failure).splitlines() or [""])[0]
    if why is not None and needs_hooks and not had_hooks:
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


def _logprobs(path: ScoringPath, pairs: list[Pair], way: Sharing) -> Float32[Tensor, " S"]:
    found = token_stats(path, pairs, max_tokens=2**14, stats=("logprob",), sharing=way)
    assert found.logprob is not None
    return found.logprob.float()


class ReferenceScores:
    """Log-probs of each sequence alone, and how far rounding may move them.

    Args:
        model: What they are of.
        run: Computes them, in any shape, each sequence alone.
    """

    def __init__(self, model: "transformers.PreTrainedModel", run: Callable[[], Tensor]):
        self.values = run()
        self.limit = TOLERANCE_NATS
        self.perturbation_rms = 0.0
        # what its products are computed in
        device, dtype = model.device.type, model.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if torch.finfo(dtype).bits < 32:
            eps = torch.finfo(dtype).eps
            self.perturbation_rms = _perturbation_rms(model, run, self.values, eps)

    def allow(self, other: Tensor) -> None:
        """Let others be as far off as `other`, `NOISE_FACTOR` times."""
        self.limit = max(self.limit, NOISE_FACTOR * _difference(other, self.values).max().item())

    def leak(self, got: Tensor) -> float | None:
        """How far `got`, of a batch, is off where no rounding explains it; None where it does."""
        off = _difference(got, self.values)
        worst = off.max().item()
        is_rounding = worst <= LEAK_NATS or _rms(off) <= LEAK_FACTOR * self.perturbation_rms
        return None if is_rounding else worst

    def mismatch(self, got: Tensor) -> str | None:
        """How `got` disagrees, in words; None if it does not."""
        off = _difference(got, self.values)
        if (worst := off.max().item()) <= self.limit:
            return None
        mean, limit = _rms(off), PERTURBATION_FACTOR * self.perturbation_rms
        if mean <= limit:
            return None
        if limit:
            return f"off by {mean:.1e} nats (root mean square), more than {limit:.1e}"
        return f"off by {worst:.1e} nats, more than {self.limit:.1e}"


def _perturbation_rms(
    model: "transformers.PreTrainedModel", run: Callable[[], Tensor], values: Tensor, eps: float
) -> float:
    """Root mean square of what one more rounding of the embeddings, to `eps`, changes."""
    generator = torch.Generator().manual_seed(0)

    def perturb(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        sign = torch.randint(0, 2, out.shape, generator=generator).to(out.device) * 2 - 1
        # a little more than half of the last place, so that it is not rounded back
        return (out.float() * (1 + 0.51 * eps * sign)).to(out.dtype)

    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    handle = embeddings.register_forward_hook(perturb)
    try:
        return _rms(torch.stack([_difference(run(), values) for _ in range(N_PERTURBATIONS)]))
    finally:
        handle.remove()


def _difference(got: Tensor, want: Tensor) -> Tensor:
    """In nats; NaN on one side only is the worst of errors."""
    same = (got == want) | (got.isnan() & want.isnan())
    return torch.where(same, 0.0, (got - want).abs().float()).nan_to_num(nan=float("inf"))


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
