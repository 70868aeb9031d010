"""One step of drawing inside `generate`: raw logits in, a single possible token out.

B rows, V vocabulary.
"""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from .draw import draw
from .protocol import FinishReason, SamplingConfig

FORCED = 0.0


class DrawStep(LogitsProcessor):
    """Chooses every row's token and remembers its raw log-prob.

    Args:
        model: Asked again, for one row alone, where a draw is a near-tie.
        keys: One a row; see `draw.row_key`.
        eos_ids: A row ends when it draws one of these.
        config: How to draw.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        keys: Int64[Tensor, " B"],
        eos_ids: tuple[int, ...],
        config: SamplingConfig,
    ):
        self.model = model
        self.keys = keys
        self.eos = torch.tensor(eos_ids, device=keys.device, dtype=torch.int64)
        # only ever seen behind the end of a row
        self.pad_id = eos_ids[0] if eos_ids else 0
        self.config = config
        self.is_open = torch.ones_like(keys, dtype=torch.bool)
        self.is_nan = torch.zeros_like(self.is_open)
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self.counted: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores that leave one choice: the drawn token."""
        logits = scores.float()
        is_nan = logits.isnan().any(dim=1) & self.is_open
        self.is_nan |= is_nan
        self.is_open &= ~is_nan
        token = self._draw(input_ids, logits)
        logprob = logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(dim=1)
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.counted.append(self.is_open.clone())
        self.is_open &= ~torch.isin(token, self.eos)
        # a row of NaN has no end of its own
        token = torch.where(self.is_nan, self.pad_id, token)
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(1, token[:, None], FORCED)

    def _draw(self, input_ids: Tensor, logits: Float32[Tensor, "B V"]) -> Int64[Tensor, " B"]:
        how = {"temperature": self.config.temperature, "top_p": self.config.top_p}
        step = len(self.tokens)
        drawn = draw(logits, self.keys, step, **how)
        token = drawn.token
        if self.model.dtype == torch.float32:
            for row in (drawn.is_near_tie & self.is_open).nonzero().flatten().tolist():
                alone = self.model(input_ids=input_ids[row : row + 1], use_cache=False)
                last = alone.logits[:, -1].float()
                token[row] = draw(last, self.keys[row : row + 1], step, **how).token[0]
        return token

    def results(self) -> tuple[list[list[int]], list[list[float]], list[FinishReason]]:
        """Ids, log-probs and finish reason of every row."""
        counts = torch.stack(self.counted).sum(dim=0).tolist()
        tokens = torch.stack(self.tokens, dim=1).tolist()
        logprobs = torch.stack(self.logprobs, dim=1).tolist()
        reasons: list[FinishReason] = [
            "nan" if is_nan else "length" if is_open else "stop"
            for is_nan, is_open in zip(self.is_nan.tolist(), self.is_open.tolist(), strict=True)
        ]
        ids = [row[:count] for row, count in zip(tokens, counts, strict=True)]
        kept = [row[:count] for row, count in zip(logprobs, counts, strict=True)]
        return ids, kept, reasons
