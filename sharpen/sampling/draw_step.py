"""One step of drawing for the open rows of a batch: raw logits in, one token a row out.

B rows, A of them that are open, C that go on, P prompt tokens, T most new tokens, V vocabulary.
"""

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from .draw import draw
from .protocol import FinishReason, SamplingConfig

FORCED = 0.0


class DrawStep:
    """Chooses every row's token and remembers its raw log-prob.

    Args:
        model: Asked again, for one row alone, where a draw is a near-tie.
        prompts: Of each row, all of one length.
        keys: One a row; see `draw.row_key`.
        eos_ids: A row ends when it draws one of these.
        config: How to draw.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Int64[Tensor, "B P"],
        keys: Int64[Tensor, " B"],
        eos_ids: tuple[int, ...],
        config: SamplingConfig,
    ):
        self.model, self.prompts, self.keys, self.config = model, prompts, keys, config
        self.eos = torch.tensor(eos_ids, device=keys.device, dtype=torch.int64)
        # only ever seen behind the end of a row
        self.pad_id = eos_ids[0] if eos_ids else 0
        self.step = 0
        shape = len(keys), config.max_new_tokens
        self.token_BT = torch.zeros(shape, dtype=torch.int64, device=keys.device)
        self.logprob_BT = torch.zeros(shape, device=keys.device)
        self.count_B = torch.zeros_like(keys)
        self.is_open = torch.ones_like(keys, dtype=torch.bool)
        self.is_nan = torch.zeros_like(self.is_open)

    def __call__(
        self, rows: Int64[Tensor, " A"], scores: Float[Tensor, "A V"]
    ) -> tuple[Int64[Tensor, " A"], Int64[Tensor, " C"]]:
        """The token of each row, and which of `rows` go on, by their place there.

        Args:
            rows: Numbers of the rows that `scores` are of.
            scores: Their raw logits.
        """
        logits_AV = scores.float()
        is_nan_A = logits_AV.isnan().any(dim=1) & self.is_open[rows]
        is_open_A = self.is_open[rows] & ~is_nan_A
        token_A = self._draw(rows, is_open_A, logits_AV)
        chosen_A = logits_AV.gather(1, token_A[:, None]).squeeze(1)
        self.token_BT[rows, self.step] = token_A
        self.logprob_BT[rows, self.step] = chosen_A - logits_AV.logsumexp(dim=1)
        self.count_B[rows] += is_open_A
        self.is_nan[rows] |= is_nan_A
        is_open_A = is_open_A & ~torch.isin(token_A, self.eos)
        self.is_open[rows] = is_open_A
        self.step += 1
        # a row of NaN has no end of its own
        token_A = torch.where(self.is_nan[rows], self.pad_id, token_A)
        goes_on_A = is_open_A & (self.step < self.config.max_new_tokens)
        return token_A, goes_on_A.nonzero().flatten()

    def _draw(
        self, rows: Int64[Tensor, " A"], is_open: Bool[Tensor, " A"], logits: Float32[Tensor, "A V"]
    ) -> Int64[Tensor, " A"]:
        how = {"temperature": self.config.temperature, "top_p": self.config.top_p}
        keys_A = self.keys[rows]
        drawn = draw(logits, keys_A, self.step, **how)
        token_A = drawn.token
        if self.model.dtype == torch.float32:
            for i in (drawn.is_near_tie & is_open).nonzero().flatten().tolist():
                row = int(rows[i])
                ids = torch.cat([self.prompts[row], self.token_BT[row, : self.step]])
                last = self.model(input_ids=ids[None], use_cache=False).logits[:, -1].float()
                token_A[i] = draw(last, keys_A[i : i + 1], self.step, **how).token[0]
        return token_A

    def results(self) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
        """Ids, log-probs and finish reason of every row."""
        return results(self.token_BT, self.logprob_BT, self.count_B, self.is_open, self.is_nan)


def results(
    token: Int64[Tensor, "B T"],
    logprob: Float32[Tensor, "B T"],
    count: Int64[Tensor, " B"],
    is_open: Bool[Tensor, " B"],
    is_nan: Bool[Tensor, " B"],
) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
    """The first `count` ids and log-probs of every row, and its finish reason."""
    counts = count.tolist()
    reasons: list[FinishReason] = [
        "nan" if nan else "length" if open_ else "stop"
        for nan, open_ in zip(is_nan.tolist(), is_open.tolist(), strict=True)
    ]
    ids = [row[:n] for row, n in zip(token.tolist(), counts, strict=True)]
    logprobs = [row[:n] for row, n in zip(logprob.tolist(), counts, strict=True)]
    return ids, logprobs, reasons


class DrawnOnly(LogitsProcessor):
    """A step inside `generate`: scores that leave one choice, the drawn token."""

    def __init__(self, step: DrawStep):
        self.step = step
        self.rows = torch.arange(len(step.keys), device=step.keys.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """-inf but at the drawn tokens."""
        token, _ = self.step(self.rows, scores)
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(1, token[:, None], FORCED)
