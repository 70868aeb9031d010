"""A step of drawing from a proposal q ~ p^(1/temperature) that keeps log p and log q of its tokens.

B rows, A of them that are open, P prompt tokens, T most new tokens, V vocabulary.
"""

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from .draw_step import DrawStep
from .protocol import SamplingConfig


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
        self.kept_BT = self.token_BT
        self.n_kept_B = torch.zeros_like(self.count_B)

    def keep(self, tokens: Int64[Tensor, "B T"], n: Int64[Tensor, " B"]) -> None:
        """The first `n` tokens of each row are these, whatever is drawn; none ends a row."""
        self.kept_BT, self.n_kept_B = tokens, n

    def _draw(
        self, rows: Int64[Tensor, " A"], is_open: Bool[Tensor, " A"], logits: Float32[Tensor, "A V"]
    ) -> Int64[Tensor, " A"]:
        is_kept_A = self.step < self.n_kept_B[rows]
        drawn_A = super()._draw(rows, is_open & ~is_kept_A, logits)
        token_A = torch.where(is_kept_A, self.kept_BT[rows, self.step], drawn_A)
        tempered_AV = logits / self.proposal_temperature
        chosen_A = tempered_AV.gather(1, token_A[:, None]).squeeze(1)
        self.proposal_BT[rows, self.step] = chosen_A - tempered_AV.logsumexp(dim=1)
        return token_A
