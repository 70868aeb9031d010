"""y*(x), the most probable completion of a prompt: best-first search that proves its answer.

    y*(x) = argmax_y log pi(y|x)   over completions that the model ends within T new tokens

The log-prob of a prefix only falls as it grows, so it bounds every completion of it. Prefixes are
expanded best first, a batch at a time, after one greedy dive that finds an incumbent. Nothing that
is left can beat what was found once the best open prefix lies below it.

No child stands above its parent, rounding included (`Tree.grow`). What the search cannot see is the
model's own rounding: a sequence has other last bits in another batch. Every listed sequence is
scored a second time, apart from the search. A proof asks that the two agree to half a tolerance,
and that all that is not listed lies further below y* than that.

The space: completions that end with an EOS token, at most T tokens with it. What reaches T tokens
without EOS is cut, as in sampling, where it never wins; its mass is counted apart.

`find_mode` searches as `SearchConfig` says and returns a `Mode`; `Tree` holds the prefixes: what is
open, what is finished, what can still win.

B prefixes of one batch, V vocabulary. Log-probabilities are nats.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from sharpen.errors import InputError, check_fields
from sharpen.models import ModelLimits
from sharpen.scoring import Scorer
from sharpen.scoring.batching import inverse_of, make_batches
from sharpen.scoring.model_access import evaluating, input_device, rope_boundary
from sharpen.scoring.token_stats import logit_rows

Ids = tuple[int, ...]


@dataclass(frozen=True)
class SearchConfig:
    """How far to search.

    Attributes:
        max_new_tokens: T; a completion of T tokens without EOS is cut.
        gamma: List also every completion of at least (1 - gamma) times the best probability.
        above: List also every completion of at least this log-prob, in nats; None for none.
        max_expansions: Give up, unproved, after this many prefixes.
        batch: Most prefixes in one forward; those beyond the best are a bet.
        max_tokens: Budget of one forward, in padded tokens.
        tolerance: Log-probs closer than this, in nats, are not told apart by the search: what
            comes so near the end of the list is kept, and settled by the scorer. At 0,
            rounding stands against every proof.
    """

    max_new_tokens: int = 256
    gamma: float = 0.0
    above: float | None = None
    max_expansions: int = 100_000
    batch: int = 8
    max_tokens: int = 16384
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        rules = [
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("gamma", 0 <= self.gamma < 1, "in [0, 1)"),
            ("above", self.above is None or self.above <= 0, "at most 0 nats"),
            ("max_expansions", self.max_expansions >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("tolerance", 0 <= self.tolerance < math.inf, "at least 0 and finite"),
        ]
        check_fields(self, rules)


@dataclass(frozen=True)
class Mode:
    """What a search found.

    Attributes:
        sequences: Completions as ids with their EOS, most probable first (equal ones by ids): at
            least the two best found, and all that `gamma` and `above` ask for.
        logprobs: Of each, in nats, by the scorer.
        bound: No completion outside `sequences` has a larger log-prob.
        proved: Nothing outside `sequences` comes up to the first of them: it is y*.
        complete: The list is complete: the runner-up and every sum over the list are exact too.
        n_expanded: Prefixes whose next tokens were computed.
        finished_mass: Probability of every completion met, listed or not: a lower bound of what
            ends within T tokens.
        cut_mass: Probability of what was met at T tokens without EOS: a lower bound too.
        cut_bound: No cut completion met has a larger log-prob; if below that of a proved y*, a
            larger T has the same y*.
        rounding: Largest difference, in nats, between the search's log-prob of a listed completion
            and the scorer's.
    """

    sequences: list[Ids]
    logprobs: list[float]
    bound: float
    proved: bool
    complete: bool
    n_expanded: int
    finished_mass: float
    cut_mass: float
    cut_bound: float
    rounding: float

    @property
    def logprob(self) -> float:
        """Log pi(y*|x) in nats; -inf if nothing was found."""
        return self.logprobs[0] if self.logprobs else -math.inf

    @property
    def runner_up(self) -> float:
        """Log-prob of the second best completion in nats; -inf if there is none."""
        return self.logprobs[1] if len(self.logprobs) > 1 else -math.inf


def find_mode(
    scorer: Scorer,
    prompt: Sequence[int],
    eos_ids: Sequence[int],
    config: SearchConfig = SearchConfig(),
) -> Mode:
    r"""The most probable completion of `prompt`, with a proof or an honest "not proved".

    Prefixes are read whole in padded batches; what is listed is scored once more by `scorer`.

    Args:
        scorer: Of an fp32 or fp64 model; in half precision a log-prob depends on its batch.
        prompt: Token ids, with their BOS if the model has one.
        eos_ids: Tokens that end a completion.
        config: How far to search.

    Source:
        y* is Eq. (2) of Huang et al. 2024, arXiv:2412.01951. The search is A* without a heuristic:
        Hart, Nilsson and Raphael 1968.

    Example:
        >>> scorer = Scorer("game24")
        >>> prompt = scorer.tokenizer("Numbers: 4 4 6 8 Target: 24\n")["input_ids"]
        >>> mode = find_mode(scorer, prompt, [2], SearchConfig(max_new_tokens=48))
        >>> mode.proved, scorer.tokenizer.decode(mode.sequences[0]).splitlines()[0]
        (True, '6 - 4 = 2 left: 2 4 8')
    """
    model = scorer.model
    _check(model, prompt, eos_ids, config)
    tree = Tree(
        # named twice, a token would end every completion twice
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        depth=config.max_new_tokens,
        gamma=config.gamma,
        above=config.above,
        tolerance=config.tolerance,
    )
    n_expanded = 0
    with torch.no_grad(), evaluating(model):
        while wanted := tree.take(min(config.batch, config.max_expansions - n_expanded)):
            tree.grow(wanted, next_logprobs(model, prompt, wanted, config.max_tokens))
            n_expanded += len(wanted)
    found = tree.listed()
    logprobs = _scored(scorer, prompt, list(found))
    ranked = sorted(zip(logprobs, found, strict=True), key=lambda x: (-x[0], x[1]))
    rounding = max((abs(x - found[ids]) for x, ids in ranked), default=0.0)
    best = ranked[0][0] if ranked else -math.inf
    bound, margin = tree.bound, config.tolerance / 2
    return Mode(
        sequences=[ids for _, ids in ranked],
        logprobs=[logprob for logprob, _ in ranked],
        bound=bound,
        proved=rounding <= margin and bound < best - margin if ranked else tree.complete,
        complete=tree.complete,
        n_expanded=n_expanded,
        finished_mass=tree.finished_mass,
        cut_mass=tree.cut_mass,
        cut_bound=tree.cut_bound,
        rounding=rounding,
    )


def next_logprobs(
    model: PreTrainedModel, prompt: Sequence[int], prefixes: Sequence[Ids], max_tokens: int
) -> Float64[Tensor, "B V"]:
    """Log-prob in nats of every next token after each prefix, on the CPU."""
    # the completion is one token that is predicted and never read
    pairs = [([*prompt, *prefix], [0]) for prefix in prefixes]
    device, boundary = input_device(model), rope_boundary(model)
    rows, places = [], []
    for batch in make_batches(pairs, max_tokens, boundary=boundary):
        logits_BV = logit_rows(model, batch.to(device))
        rows.append(logits_BV.double().log_softmax(dim=1).cpu())
        places.append(batch.output_index)
    return torch.cat(rows)[inverse_of(places)]


def _scored(scorer: Scorer, prompt: Sequence[int], found: Sequence[Ids]) -> list[float]:
    """Log-prob of each completion by the scorer, in nats."""
    if not found:
        return []
    scores = scorer.score([list(prompt)], [[list(ids) for ids in found]])
    assert scores.tokens.logprob is not None
    token_S, bounds = scores.tokens.logprob.double(), scores.offsets.diff().tolist()
    return [part.sum().item() for part in token_S.split(bounds)]


def _check(
    model: PreTrainedModel, prompt: Sequence[int], eos_ids: Sequence[int], config: SearchConfig
) -> None:
    """Reject what cannot be searched."""
    limits = ModelLimits.of(model)
    limits.check("prompt", prompt)
    if not eos_ids:
        raise InputError("`eos_ids` must hold at least one token, got none; nothing would end.")
    limits.check("eos_ids", list(eos_ids))
    total = len(prompt) + config.max_new_tokens
    if limits.max_length is not None and total > limits.max_length:
        raise InputError(
            f"prompt of {len(prompt)} tokens + `max_new_tokens` {config.max_new_tokens} must fit "
            f"the model's context of {limits.max_length}; lower `max_new_tokens`."
        )
    if torch.finfo(model.dtype).bits < 32:
        raise InputError(
            f"`scorer` must hold an fp32 or fp64 model, got {model.dtype}; load it with "
            "dtype='float32'."
        )


@dataclass(frozen=True)
class _Node:
    """An expanded prefix and its children, most probable first."""

    ids: Ids
    tokens: np.ndarray
    logprobs: np.ndarray


@dataclass
class Tree:
    """Prefixes from the empty one on: what is open, what is finished, what can still win.

    A heap holds one entry per expanded prefix, for its best child that was not yet taken; children
    are sorted once, so a large vocabulary costs one array a prefix and no heap of its own.

    Attributes:
        eos_ids: Tokens that finish a sequence.
        depth: A sequence of so many tokens without EOS is cut.
        gamma: As in `SearchConfig`.
        above: As in `SearchConfig`.
        tolerance: As in `SearchConfig`.
        finished_mass: Probability of all finished sequences met.
        cut_mass: Probability of all cut sequences met.
        cut_bound: Largest log-prob of a cut sequence met.
    """

    eos_ids: Ids
    depth: int
    gamma: float
    above: float | None
    tolerance: float
    finished_mass: float = 0.0
    cut_mass: float = 0.0
    cut_bound: float = -math.inf
    _heap: list[tuple[float, int, int]] = field(default_factory=list)
    _nodes: list[_Node] = field(default_factory=list)
    _finished: list[tuple[float, Ids]] = field(default_factory=list)
    # the two best finished log-probs, ascending
    _best_two: tuple[float, float] = (-math.inf, -math.inf)
    # log-prob of each prefix that was handed out
    _out: dict[Ids, float] = field(default_factory=lambda: {(): 0.0})
    # the next prefix of the greedy dive; None once it has ended
    _dive: Ids | None = ()
    _lost: float = -math.inf

    @property
    def level(self) -> float:
        """Log-prob from which on sequences are listed; it only rises."""
        second, best = self._best_two
        asked = math.inf if self.above is None else self.above
        return min(second, best + math.log1p(-self.gamma), asked)

    @property
    def _floor(self) -> float:
        return self.level - self.tolerance

    @property
    def _open(self) -> float:
        """Largest log-prob of a prefix that waits."""
        waiting = -self._heap[0][0] if self._heap else -math.inf
        return waiting if self._dive is None else max(waiting, self._out[self._dive])

    @property
    def bound(self) -> float:
        """No sequence outside `listed` has a larger log-prob."""
        return max(self._open, self._lost, self._floor)

    @property
    def complete(self) -> bool:
        """Whether `listed` holds every sequence from `level` on."""
        return max(self._open, self._lost) <= self._floor

    def listed(self) -> dict[Ids, float]:
        """Log-probs of the finished sequences from `tolerance` below `level` on."""
        return {ids: logprob for logprob, ids in self._finished if logprob >= self._floor}

    def take(self, n: int) -> list[Ids]:
        """Up to `n` prefixes to expand next, best first; none when the search is over.

        They are the caller's until `grow`.
        """
        if n < 1:
            return []
        if self._dive is not None and self._out[self._dive] > self._floor:
            return [self._dive]
        self._dive = None
        taken = []
        while len(taken) < n and self._heap and self._open > self._floor:
            negative, index, rank = heapq.heappop(self._heap)
            node = self._nodes[index]
            ids = (*node.ids, int(node.tokens[rank]))
            self._out[ids] = -negative
            taken.append(ids)
            self._push(index, rank + 1)
        return taken

    def grow(self, prefixes: Sequence[Ids], logprobs: Float64[Tensor, "B V"]) -> None:
        """Take in the next-token log-probs of prefixes that `take` gave."""
        step_BV = logprobs.numpy()
        for ids, step_V in zip(prefixes, step_BV, strict=True):
            start = self._out.pop(ids)
            diving, self._dive = ids == self._dive, None
            if np.isnan(step_V).any():
                # nothing is known of what lies below: it may be as probable as the prefix
                self._lost = max(self._lost, start)
                continue
            # the bound of a prefix holds for its children even where rounding would lift one
            total_V = np.minimum(start + step_V, start)
            self._finish(ids, total_V)
            end = max(total_V[list(self.eos_ids)])
            total_V[list(self.eos_ids)] = -math.inf
            if len(ids) + 1 == self.depth:
                self.cut_mass += float(np.exp(total_V).sum())
                self.cut_bound = max(self.cut_bound, float(total_V.max()))
                continue
            (kept,) = np.nonzero(total_V > self._floor)
            # stable: of equals the smaller id
            order = kept[np.argsort(-total_V[kept], kind="stable")]
            self._nodes.append(_Node(ids, order, total_V[order]))
            if diving and len(order) and total_V[order[0]] > end:
                self._dive = (*ids, int(order[0]))
                self._out[self._dive] = float(total_V[order[0]])
            self._push(len(self._nodes) - 1, 0 if self._dive is None else 1)

    def _push(self, index: int, rank: int) -> None:
        """Open the child of that rank, if the node has one."""
        logprob_C = self._nodes[index].logprobs
        if rank < len(logprob_C):
            heapq.heappush(self._heap, (-float(logprob_C[rank]), index, rank))

    def _finish(self, ids: Ids, total: np.ndarray) -> None:
        """Take in the completions that end right after the prefix."""
        for eos in self.eos_ids:
            logprob = float(total[eos])
            if logprob == -math.inf:
                continue
            self.finished_mass += math.exp(logprob)
            second, best = self._best_two
            self._best_two = max(second, min(best, logprob)), max(best, logprob)
            if logprob >= self._floor:
                self._finished.append((logprob, (*ids, eos)))
