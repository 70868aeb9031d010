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
