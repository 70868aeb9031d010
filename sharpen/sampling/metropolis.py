"""Samples of p^alpha by Metropolis-Hastings: keep a beginning, draw the rest again, accept or not.

Each completion is the last state of a chain of its own that begins at a plain sample of the model.
The moves are those of Karan & Du 2025 (arXiv:2510.14901). A move from x to x' picks a cut c, keeps
the first c tokens of x and draws the rest up to its end from the proposal q. The cut is uniform
over the T tokens of x, so the way back picks it with probability 1 / T' instead of 1 / T, and draws
the *whole* rest of x:

    log r = alpha (log p(x') - log p(x)) + log q(x from c) - log q(x' from c) + log T - log T'

With probability min(1, r) for a move, p^alpha is in detailed balance for each c alone.

`Metropolis`, `MetropolisSampler`, `MetropolisSamples`   what a user names
`Chains`, `log_ratio`                                    states, and the ratio of a move
`resample_suffix`                                        decodes every chain from its own cut

All chains of a batch move in one decoding, on one copy of each prompt's keys and on the keys of
their kept tokens.

B chains, A of them that are active, G prompts of P tokens, T most new tokens, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from numbers import Integral

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharpen.errors import InputError, check_fields
from sharpen.scoring.hooks import under
from sharpen.scoring.model_access import evaluating

from .base import Prompt, Samples, SamplingConfig, Share
from .decode import logits_of_whole, next_logits, read_prompts
from .draw import child_keys, uniform
from .hf import RowResults, row_results
from .power import PowerSampler, TemperedStep
from .prompt_cache import COPIES, ChainCache, StepPlan


@dataclass(frozen=True)
class Metropolis:
    """How to walk towards p^alpha.

    Attributes:
        alpha: Power of the target, at least 1: 1 + 1 / beta of KL-regularised self-reward. inf
            accepts what is likelier and nothing else: a search for the likeliest completion.
        steps: Moves of each chain; a chain's distribution tends to the target as they grow.
        proposal_temperature: At which rests are drawn; None for 1 / alpha.

    Raises:
        InputError: If a value is out of its range.
    """

    alpha: float = 4.0
    steps: int = 10
    proposal_temperature: float | None = None

    def __post_init__(self) -> None:
        tau = self.proposal_temperature
        rules = [
            ("alpha", self.alpha >= 1, "at least 1"),
            ("steps", self.steps >= 1, "at least 1"),
            ("steps", isinstance(self.steps, Integral), "a whole number"),
            ("proposal_temperature", tau is None or 0 < tau < math.inf, "above 0 and finite"),
        ]
        check_fields(self, rules)
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


class MetropolisSampler(PowerSampler[Metropolis]):
    """The `Sampler` of p^alpha by Metropolis-Hastings; `n` chains for each prompt.

    Chain i depends on the model, its prompt, i, the seed and the settings alone, as a sample of
    `TransformersSampler` does, and begins at that sampler's sample i. What is not settled against
    rounding is whether a move is accepted: in another batch one may fall otherwise.

    Args:
        model: As for `TransformersSampler`.
        tokenizer: As for `TransformersSampler`.
        power: How to walk.
        max_tokens: As for `TransformersSampler`, but a chain holds keys and values of three times
            `max_new_tokens`: of its state, of its proposal, and of what is being decoded.
        sharing: As for `PowerSampler`.
    """

    copies = COPIES

    def _run(
        self, prompts: Sequence[Prompt], batch: list[Share], config: SamplingConfig
    ) -> list[Samples]:
        prompts_GP, counts, keys_B = self._rows(prompts, batch, config)
        with torch.no_grad(), evaluating(self.model):
            walk = _Walk(self, prompts_GP, counts, keys_B, config)
            state = walk.run()
        accepted = (walk.accepted_B.double() / self.power.steps).tolist()
        drawn, read_again = walk.drawn_B.tolist(), walk.read_again_B.tolist()
        asked = [prompts[share.prompt] for share in batch]
        found: list[Samples] = []
        end = 0
        for samples in self._samples(asked, counts, state.results()):
            start, end = end, end + len(samples.completions)
            found.append(
                MetropolisSamples(
                    **vars(samples),
                    accepted=accepted[start:end],
                    drawn=drawn[start:end],
                    read_again=read_again[start:end],
                )
            )
        return found


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
        if sampler._reads_once(prompts.shape[1], T):
            self.reader = _SharedPrompts(model, prompts, counts, T)
        else:
            self.reader = _WholeSequences(model, self.prompts_BP)
        self.accepted_B = torch.zeros_like(keys)
        self.drawn_B = torch.zeros_like(keys)
        self.read_again_B = torch.zeros_like(keys)

    def run(self) -> "Chains":
        """The last states."""
        first = self._step(self.config, self.keys_B)
        state = self._drawn(first, torch.zeros_like(self.keys_B))
        self.reader.settle(torch.ones_like(state.is_open))
        tempered = dataclasses.replace(self.config, temperature=self.power.temperature)
        for move in range(self.power.steps):
            cut_B = (self._uniform(f"cut {move}") * state.count).long()
            step = self._step(tempered, child_keys(self.keys_B, f"move {move}"))
            _keep(step, state, cut_B)
            new = self._drawn(step, cut_B)
            log_r_B = log_ratio(state, new, cut_B, self.power.alpha)
            # a state whose logits are NaN stays, and none is ever entered
            is_taken_B = self._uniform(f"accept {move}").log() < log_r_B
            is_taken_B &= ~(state.is_nan | new.is_nan)
            self.reader.settle(is_taken_B)
            state = state.moved(new, is_taken_B)
            self.accepted_B += is_taken_B
        return state

    def _step(self, config: SamplingConfig, keys: Int64[Tensor, " B"]) -> TemperedStep:
        model, eos_ids = self.sampler.model, self.sampler.eos_ids
        tau = self.power.temperature
        return TemperedStep(model, self.prompts_BP, keys, eos_ids, config, tau)

    def _drawn(self, step: TemperedStep, begin: Int64[Tensor, " B"]) -> "Chains":
        """The states that `step` leads to, drawn from the tokens `begin` on."""
        resample_suffix(step, begin, self.reader)
        self.drawn_B += step.count_B - begin
        self.read_again_B += begin > 0
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


@dataclass(frozen=True, eq=False)
class Chains:
    """The state of each chain: one completion.

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

        def chosen(name: str) -> Tensor:
            mine = getattr(self, name)
            return torch.where(where.view(-1, *[1] * (mine.dim() - 1)), getattr(to, name), mine)

        return Chains(*(chosen(field.name) for field in fields(self)))

    def results(self) -> RowResults:
        """Ids, log-probs and finish reason of every chain."""
        return row_results(self.token, self.logprob, self.count, self.is_open, self.is_nan)


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


def _keep(step: TemperedStep, state: Chains, n: Int64[Tensor, " B"]) -> None:
    """Begin each row of `step` with the first `n` tokens of its state, at most T - 1 of them."""
    is_kept_BT = torch.arange(state.token.shape[1], device=n.device) < n[:, None]
    step.token_BT = torch.where(is_kept_BT, state.token, step.token_BT)
    step.logprob_BT = torch.where(is_kept_BT, state.logprob, step.logprob_BT)
    step.proposal_BT = torch.where(is_kept_BT, state.proposal, step.proposal_BT)
    step.count_B = n.clone()


def resample_suffix(
    step: TemperedStep, begin: Int64[Tensor, " B"], reader: "_SharedPrompts | _WholeSequences"
) -> None:
    """Draw every row from its token `begin` on; the tokens before it are not decoded again.

    At step t those rows run that begin at token t or before and are active, so all have t tokens
    behind their prompt. A row that begins at c > 0 comes in with token c - 1: of the tokens that it
    keeps the one whose logits are needed.
    """
    begins, device = begin.tolist(), begin.device
    coming: dict[int, list[int]] = {}
    for row, n in enumerate(begins):
        coming.setdefault(n, []).append(row)
    reader.begin()
    rows = torch.tensor(coming.get(0, []), dtype=torch.int64, device=device)
    logits = reader.first_logits(rows) if len(rows) else None
    for t in range(step.config.max_new_tokens):
        step.step = t
        ids = rows
        if logits is not None:
            token_A, active = step(rows, logits)
            rows, ids = rows[active], token_A[active]
        if new := coming.get(t + 1):
            joining = torch.tensor(new, device=device)
            # side by side again, prompt by prompt
            rows, order = torch.cat([rows, joining]).sort()
            ids = torch.cat([ids, step.token_BT[joining, t]])[order]
        if not len(rows) and t + 1 >= max(begins):
            return
        logits = reader.next_logits(rows, step.token_BT[rows, :t], ids) if len(rows) else None


class _SharedPrompts:
    """Prompts are read once, and a token of a row when it is drawn."""

    def __init__(
        self, model: PreTrainedModel, prompts: Int64[Tensor, "G P"], counts: Sequence[int], T: int
    ):
        cache, self.first = read_prompts(model, prompts)
        self.model = model
        self.cache = ChainCache(cache, counts, T)
        owner_B = torch.repeat_interleave(torch.tensor(list(counts)))
        self.owner = owner_B.to(self.first.device)
        self.running: list[int] = []

    def begin(self) -> None:
        """What is read from now on can be taken back."""
        self.cache.begin()
        self.running = []

    def settle(self, is_taken: Bool[Tensor, " B"]) -> None:
        """Which rows have become what was drawn last; the others are what they were."""
        self.cache.settle(is_taken)

    def first_logits(self, rows: Int64[Tensor, " A"]) -> Float[Tensor, "A V"]:
        """Logits behind the prompts of these rows."""
        return self.first[self.owner[rows]]

    def next_logits(
        self, rows: Int64[Tensor, " A"], before: Int64[Tensor, "A t"], ids: Int64[Tensor, " A"]
    ) -> Float[Tensor, "A V"]:
        """Logits behind the tokens `ids` of these rows, `before` which others were read."""
        # rows that stay together are decoded in place
        if (numbers := rows.tolist()) != self.running:
            self.cache.take(rows, before.shape[1])
            self.running = numbers
        with under(StepPlan(self.cache)):
            return next_logits(self.model, ids[:, None], self.cache)


class _WholeSequences:
    """Whole sequences are read at every token: right for any causal model, and slower."""

    def __init__(self, model: PreTrainedModel, prompts: Int64[Tensor, "B P"]):
        self.model, self.prompts = model, prompts

    def begin(self) -> None:
        """See `_SharedPrompts`; nothing is kept."""

    def settle(self, is_taken: Bool[Tensor, " B"]) -> None:
        """See `_SharedPrompts`; there is nothing to take back."""

    def first_logits(self, rows: Int64[Tensor, " A"]) -> Float[Tensor, "A V"]:
        """See `_SharedPrompts`."""
        return logits_of_whole(self.model, self.prompts[rows])

    def next_logits(
        self, rows: Int64[Tensor, " A"], before: Int64[Tensor, "A t"], ids: Int64[Tensor, " A"]
    ) -> Float[Tensor, "A V"]:
        """See `_SharedPrompts`."""
        whole = torch.cat([self.prompts[rows], before, ids[:, None]], dim=1)
        return logits_of_whole(self.model, whole)
