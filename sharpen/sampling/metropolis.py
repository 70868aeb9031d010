"""Samples of p^alpha by Metropolis-Hastings: keep a beginning, draw the rest again, accept or not.

Each completion is the last state of a chain of its own that begins at a plain sample of the model.
The moves are those of Karan & Du 2025 (arXiv:2510.14901), with the exact ratio of `chains.py`: of
whole rests, and with the probability of the cut. All chains of a batch move in one decoding, on
one copy of each prompt's keys and on the keys of their kept tokens (`redraw.py`).

B chains, G prompts of P tokens, T most new tokens.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sharpen.errors import InputError
from sharpen.scoring.forward import evaluating

from . import chains
from .chain_cache import COPIES
from .chains import Chains
from .draw import child_keys, row_key, uniform
from .hf import Rows
from .plan import Share
from .power import PowerSampler, check_settings
from .protocol import Prompt, Samples, SamplingConfig
from .redraw import OnSharedPrompts, Redrawing, Rereading
from .tempered_step import TemperedStep


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
            log_r_B = chains.log_ratio(state, new, cut_B, self.power.alpha)
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
