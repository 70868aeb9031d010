"""Draw rows again from places of their own; what a row keeps is not decoded again.

At step t those rows run that begin at token t or before and are open, so all have t tokens behind
their prompt. A row that begins at c > 0 comes in with token c - 1: of the tokens that it keeps the
one whose logits are needed.

B rows, A that run, G prompts of P tokens, T most new tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedModel

from sharpen.scoring.forward import accepted
from sharpen.scoring.hooks import under

from .chain_cache import ChainCache
from .decode import next_logits, read
from .prompt_cache import StepPlan
from .tempered_step import TemperedStep

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
