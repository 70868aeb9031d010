"""A step of drawing from a proposal q ~ p^(1/temperature) that keeps log p and log q of its tokens.

B rows, A of them that are open, P prompt tokens, T most new tokens, V vocabulary.

The states of Metropolis-Hastings chains over completions, and the ratio that accepts a move.

A move from x to x' picks a cut c, keeps the first c tokens of x and draws the rest up to its end
from the proposal q. The cut is uniform over the T tokens of x, so the way back picks it with
probability 1 / T' instead of 1 / T, and draws the *whole* rest of x:

    log r = alpha (log p(x') - log p(x)) + log q(x from c) - log q(x' from c) + log T - log T'

With probability min(1, r) for a move, p^alpha is in detailed balance for each c alone.

B chains, T most new tokens.

Draw rows again from places of their own; what a row keeps is not decoded again.

At step t those rows run that begin at token t or before and are open, so all have t tokens behind
their prompt. A row that begins at c > 0 comes in with token c - 1: of the tokens that it keeps the
one whose logits are needed.

B rows, A that run, G prompts of P tokens, T most new tokens, V vocabulary.

Samples of p^alpha by Metropolis-Hastings: keep a beginning, draw the rest again, accept or not.

Each completion is the last state of a chain of its own that begins at a plain sample of the model.
The moves are those of Karan & Du 2025 (arXiv:2510.14901), with the exact ratio of `chains.py`: of
whole rests, and with the probability of the cut. All chains of a batch move in one decoding, on
one copy of each prompt's keys and on the keys of their kept tokens (`redraw.py`).

B chains, G prompts of P tokens, T most new tokens.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Protocol

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError
from sharpen.scoring.hooks import under
from sharpen.scoring.model_access import accepted, evaluating

from .base import FinishReason, Prompt, Samples, SamplingConfig, Share
from .decode import next_logits, read
from .draw import child_keys, row_key, uniform
from .hf import DrawStep, Rows, results
from .power import PowerSampler, check_settings
from .prompt_cache import COPIES, ChainCache, StepPlan


class TemperedStep(DrawStep):
    """A `DrawStep` that also remembers each token's log-prob under the proposal.

    Args:
        model: As for `DrawStep`.
        prompts: As for `DrawStep`.
        keys: As for `DrawStep`.
        eos_ids: As for `DrawStep`.
        config: As for `DrawStep`; its temperature need not be the proposal's.
        proposal_temperature: Above 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Int64[Tensor, "B P"],
        keys: Int64[Tensor, " B"],
        eos_ids: tuple[int, ...],
        config: SamplingConfig,
        proposal_temperature: float,
    ):
        super().__init__(model, prompts, keys, eos_ids, config)
        self.proposal_temperature = proposal_temperature
        self.proposal_BT = torch.zeros_like(self.logprob_BT)
        self.n_kept_B = torch.zeros_like(self.count_B)

    def keep(
        self,
        token: Int64[Tensor, "B T"],
        logprob: Float32[Tensor, "B T"],
        proposal: Float32[Tensor, "B T"],
        n: Int64[Tensor, " B"],
    ) -> None:
        """Begin each row with the first `n` of these, drawn before; none ends a row.

        Args:
            token: Their ids.
            logprob: As `logprob_BT`.
            proposal: As `proposal_BT`.
            n: At most T - 1 of a row.
        """
        is_kept_BT = torch.arange(token.shape[1], device=token.device) < n[:, None]
        self.token_BT = torch.where(is_kept_BT, token, self.token_BT)
        self.logprob_BT = torch.where(is_kept_BT, logprob, self.logprob_BT)
        self.proposal_BT = torch.where(is_kept_BT, proposal, self.proposal_BT)
        self.n_kept_B, self.count_B = n, n.clone()

    def _draw(
        self, rows: Int64[Tensor, " A"], is_open: Bool[Tensor, " A"], logits: Float32[Tensor, "A V"]
    ) -> Int64[Tensor, " A"]:
        token_A = super()._draw(rows, is_open, logits)
        tempered_AV = logits / self.proposal_temperature
        chosen_A = tempered_AV.gather(1, token_A[:, None]).squeeze(1)
        self.proposal_BT[rows, self.step] = chosen_A - tempered_AV.logsumexp(dim=1)
        return token_A


@dataclass(frozen=True, eq=False)
class Chains:
    """One completion a chain.

    Attributes:
        token: Anything behind a completion's end.
        logprob: Of each token under the model, nats.
        proposal: Of each token under the proposal, nats.
        count: Tokens of each completion, its end token among them.
        is_open: Whether it was cut at T.
        is_nan: Whether the model's logits were NaN.
    """

    token: Int64[Tensor, "B T"]
    logprob: Float32[Tensor, "B T"]
    proposal: Float32[Tensor, "B T"]
    count: Int64[Tensor, " B"]
    is_open: Bool[Tensor, " B"]
    is_nan: Bool[Tensor, " B"]

    def total(
        self, of: Float32[Tensor, "B T"], start: Int64[Tensor, " B"]
    ) -> Float64[Tensor, " B"]:
        """Sum over the tokens from `start` to the end of each completion."""
        t_T = torch.arange(of.shape[1], device=of.device)
        is_inside_BT = (t_T >= start[:, None]) & (t_T < self.count[:, None])
        return of.double().masked_fill(~is_inside_BT, 0.0).sum(dim=1)

    def moved(self, to: "Chains", where: Bool[Tensor, " B"]) -> "Chains":
        """`to` where it says so, and these elsewhere."""
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        return Chains(
            **{
                name: torch.where(where.view(-1, *[1] * (x.dim() - 1)), getattr(to, name), x)
                for name, x in mine.items()
            }
        )

    def results(self) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
        """Ids, log-probs and finish reason of every chain."""
        return results(self.token, self.logprob, self.count, self.is_open, self.is_nan)


def log_ratio(
    old: Chains, new: Chains, cut: Int64[Tensor, " B"], alpha: float
) -> Float64[Tensor, " B"]:
    """The log of r of the moves from `old` to `new`; at alpha = inf, +inf where `new` is likelier.

    Args:
        old: Where the chains are.
        new: Where they may go: the same tokens before the cut.
        cut: The number of these tokens.
        alpha: Power of the target.
    """
    # the tokens before the cut are the same, and so are their log-probs
    gain_B = new.total(new.logprob, cut) - old.total(old.logprob, cut)
    if math.isinf(alpha):
        return torch.where(gain_B > 0, math.inf, -math.inf).double()
    back_B, there_B = old.total(old.proposal, cut), new.total(new.proposal, cut)
    return alpha * gain_B + back_B - there_B + old.count.double().log() - new.count.double().log()


# rows [A], their last token [A] and how many came before it, to the logits [A, V] behind it
Run = Callable[[Tensor, Tensor, int], Tensor]


class Redrawing(Protocol):
    """Draws the rows of one batch, again and again."""

    def __call__(self, step: TemperedStep) -> None:
        """Draw every row from where `step` begins it."""
        ...

    def settle(self, is_taken: Bool[Tensor, " B"]) -> None:
        """Say which rows have become what was drawn last; the others are what they were."""
        ...


class OnSharedPrompts:
    """Prompts are read once, and a token of a row when it is drawn.

    Args:
        model: In eval mode, with the hooks installed.
        prompts: Of one length.
        counts: Rows of each prompt.
        T: Most new tokens.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Int64[Tensor, "G P"], counts: Sequence[int], T: int
    ):
        found = read(model, prompts)
        self.model = model
        self.cache = ChainCache(found.cache, counts, T)
        owner_B = torch.repeat_interleave(torch.tensor(list(counts)))
        self.first, self.owner = found.logits, owner_B.to(found.logits.device)
        self.running: list[int] = []

    def __call__(self, step: TemperedStep) -> None:
        """See `Redrawing`."""
        self.cache.begin()
        self.running = []
        _redraw(step, lambda rows: self.first[self.owner[rows]], self._run)

    def settle(self, is_taken: Bool[Tensor, " B"]) -> None:
        """See `Redrawing`."""
        self.cache.settle(is_taken)

    def _run(self, rows: Tensor, ids: Tensor, n_before: int) -> Tensor:
        # rows that go on together go on in place
        if (numbers := rows.tolist()) != self.running:
            self.cache.take(rows, n_before)
            self.running = numbers
        with under(StepPlan(self.cache)):
            return next_logits(self.model, ids[:, None], self.cache)


class Rereading:
    """Whole sequences are read at every token: right for any causal model, and slower.

    Args:
        model: In eval mode.
        prompts: Of each row.
    """

    def __init__(self, model: PreTrainedModel, prompts: Int64[Tensor, "B P"]):
        self.model, self.prompts = model, prompts
        self.options = accepted(model, use_cache=False, logits_to_keep=1)

    def __call__(self, step: TemperedStep) -> None:
        """See `Redrawing`."""

        def run(rows: Tensor, ids: Tensor, n_before: int) -> Tensor:
            before_AL = torch.cat([self.prompts[rows], step.token_BT[rows, :n_before]], dim=1)
            return self._logits(torch.cat([before_AL, ids[:, None]], dim=1))

        _redraw(step, lambda rows: self._logits(self.prompts[rows]), run)

    def settle(self, is_taken: Bool[Tensor, " B"]) -> None:
        """See `Redrawing`; there is nothing to take back."""

    def _logits(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, **self.options).logits[:, -1]


def _redraw(step: TemperedStep, first: Callable[[Tensor], Tensor], run: Run) -> None:
    begins = step.n_kept_B.tolist()
    device = step.n_kept_B.device
    coming: dict[int, list[int]] = {}
    for row, n in enumerate(begins):
        coming.setdefault(n, []).append(row)
    rows = torch.tensor(coming.get(0, []), dtype=torch.int64, device=device)
    logits = first(rows) if len(rows) else None
    for t in range(step.config.max_new_tokens):
        step.step = t
        ids = rows
        if logits is not None:
            token_A, onward = step(rows, logits)
            rows, ids = rows[onward], token_A[onward]
        if new := coming.get(t + 1):
            joined = torch.tensor(new, device=device)
            # side by side again, prompt by prompt
            rows, order = torch.cat([rows, joined]).sort()
            ids = torch.cat([ids, step.token_BT[joined, t]])[order]
        if not len(rows) and t + 1 >= max(begins):
            return
        logits = run(rows, ids, t) if len(rows) else None


@dataclass(frozen=True)
class Metropolis:
    """How to walk towards p^alpha.

    Attributes:
        alpha: Power of the target, at least 1: 1 + 1 / beta of KL-regularised self-reward. inf
            accepts what is likelier and nothing else: a search for the likeliest completion.
        steps: Moves of each chain; a chain's law tends to the target as they grow.
        proposal_temperature: At which rests are drawn; None for 1 / alpha.
    """

    alpha: float = 4.0
    steps: int = 10
    proposal_temperature: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be walked.

        Raises:
            InputError: If a value is out of its range.
        """
        tau = self.proposal_temperature
        rules = [
            ("alpha", self.alpha >= 1, "at least 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("steps", isinstance(self.steps, Integral), "a whole number"),
            ("proposal_temperature", tau is None or 0 < tau < math.inf, "above 0 and finite"),
        ]
        check_settings(self, rules)
        if tau is None and math.isinf(self.alpha):
            raise InputError(
                "`proposal_temperature` must be given with alpha inf, got None; 0.25 is that of "
                "alpha 4."
            )

    @property
    def temperature(self) -> float:
        """Of the proposal."""
        given = self.proposal_temperature
        return 1 / self.alpha if given is None else given


@dataclass(frozen=True)
class MetropolisSamples(Samples):
    """The last state of each chain.

    Attributes:
        accepted: Share of each chain's moves that were accepted.
        drawn: Tokens that each chain drew, of its first sample and all proposals.
        read_again: Kept tokens that its moves read again on shared prompts: one of a move that
            keeps any. Where nothing is shared, every token drawn reads all that is before it.
    """

    accepted: list[float]
    drawn: list[int]
    read_again: list[int]


class MetropolisSampler(PowerSampler):
    """The `Sampler` of p^alpha by Metropolis-Hastings; `n` chains a prompt.

    Chain i depends on the model, its prompt, i, the seed and the settings alone, as a sample of
    `TransformersSampler` does, and begins at that sampler's sample i. What is not settled against
    rounding is whether a move is accepted: in another batch one may fall otherwise.

    Args:
        model: As for `TransformersSampler`.
        tokenizer: As for `TransformersSampler`.
        power: How to walk.
        max_tokens: As for `TransformersSampler`, but a chain holds keys and values of three times
            `max_new_tokens`: of its state, of its proposal, and of what is being decoded.
        sharing: As for `TransformersSampler`; where nothing is shared, whole sequences are read
            again at every token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        power: Metropolis,
        *,
        max_tokens: int = 65536,
        sharing: str = "auto",
    ):
        super().__init__(model, tokenizer, max_tokens=max_tokens, sharing=sharing)
        self.power = power

    def _held(self, max_new_tokens: int) -> int:
        return (COPIES if self.route == "shared" else 1) * max_new_tokens

    def _run(
        self, prompts: Sequence[Prompt], batch: list[Share], config: SamplingConfig
    ) -> "ChainRows":
        device = self.model.device
        prompts_GP = torch.tensor([prompts[share.prompt].ids for share in batch], device=device)
        counts = [share.stop - share.start for share in batch]
        keys = [
            row_key(config.seed, prompts[share.prompt].id, i)
            for share in batch
            for i in range(share.start, share.stop)
        ]
        with torch.no_grad(), evaluating(self.model):
            walk = _Walk(self, prompts_GP, counts, torch.tensor(keys, device=device), config)
            state = walk.run()
        owners = [share.prompt for share in batch for _ in range(share.start, share.stop)]
        rates = (walk.accepted_B.double() / self.power.steps).tolist()
        told = {"drawn": walk.drawn_B.tolist(), "read_again": walk.read_again_B.tolist()}
        return ChainRows(owners, *state.results(), accepted=rates, **told)

    def _collect(self, prompts: Sequence[Prompt], parts: Sequence[Rows], n: int) -> list[Samples]:
        of = [rows for rows in parts if isinstance(rows, ChainRows)]
        accepted = [x for rows in of for x in rows.accepted]
        drawn = [x for rows in of for x in rows.drawn]
        read_again = [x for rows in of for x in rows.read_again]
        finished: list[Samples] = []
        for i, samples in enumerate(super()._collect(prompts, parts, n)):
            span = slice(i * n, (i + 1) * n)
            finished.append(
                MetropolisSamples(
                    **vars(samples),
                    accepted=accepted[span],
                    drawn=drawn[span],
                    read_again=read_again[span],
                )
            )
        return finished


@dataclass(frozen=True)
class ChainRows(Rows):
    """What one batch produced, chain by chain; see `MetropolisSamples`."""

    accepted: list[float]
    drawn: list[int]
    read_again: list[int]


class _Walk:
    """The chains of one batch, from their first samples to their last states."""

    def __init__(
        self,
        sampler: MetropolisSampler,
        prompts: Int64[Tensor, "G P"],
        counts: list[int],
        keys: Int64[Tensor, " B"],
        config: SamplingConfig,
    ):
        self.sampler, self.power, self.config = sampler, sampler.power, config
        self.keys_B = keys
        count_G = torch.tensor(counts, device=prompts.device)
        self.prompts_BP = prompts.repeat_interleave(count_G, dim=0)
        model, T = sampler.model, config.max_new_tokens
        self.redraw: Redrawing
        if sampler.reads_once(prompts.shape[1], T):
            self.redraw = OnSharedPrompts(model, prompts, counts, T)
        else:
            self.redraw = Rereading(model, self.prompts_BP)
        self.accepted_B = torch.zeros_like(keys)
        self.drawn_B = torch.zeros_like(keys)
        self.read_again_B = torch.zeros_like(keys)

    def run(self) -> Chains:
        """The last states."""
        state = self._drawn(self._step(self.config, self.keys_B))
        self.redraw.settle(torch.ones_like(state.is_open))
        tempered = dataclasses.replace(self.config, temperature=self.power.temperature)
        for move in range(self.power.steps):
            cut_B = (self._uniform(f"cut {move}") * state.count).long()
            step = self._step(tempered, child_keys(self.keys_B, f"move {move}"))
            step.keep(state.token, state.logprob, state.proposal, cut_B)
            new = self._drawn(step)
            log_r_B = log_ratio(state, new, cut_B, self.power.alpha)
            # a state whose logits are NaN stays, and none is ever entered
            is_taken_B = self._uniform(f"accept {move}").log() < log_r_B
            is_taken_B &= ~(state.is_nan | new.is_nan)
            self.redraw.settle(is_taken_B)
            state = state.moved(new, is_taken_B)
            self.accepted_B += is_taken_B
        return state

    def _step(self, config: SamplingConfig, keys: Int64[Tensor, " B"]) -> TemperedStep:
        model, eos_ids = self.sampler.model, self.sampler.eos_ids
        tau = self.power.temperature
        return TemperedStep(model, self.prompts_BP, keys, eos_ids, config, tau)

    def _drawn(self, step: TemperedStep) -> Chains:
        self.redraw(step)
        self.drawn_B += step.count_B - step.n_kept_B
        self.read_again_B += step.n_kept_B > 0
        return Chains(
            step.token_BT,
            step.logprob_BT,
            step.proposal_BT,
            step.count_B,
            step.is_open,
            step.is_nan,
        )

    def _uniform(self, purpose: str) -> Float64[Tensor, " B"]:
        return uniform(child_keys(self.keys_B, purpose))
