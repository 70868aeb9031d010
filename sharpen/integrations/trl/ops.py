"""TRL's operations on logits under TRL's names and signatures, fused: swap one import.

    from trl.trainer.utils import selective_log_softmax          # before
    from sharpen.integrations.trl import selective_log_softmax   # after

Logits are read once forward and once backward, and nothing of their size is held beside their
gradient. Log-softmax and sums are fp32 (fp64 for fp64 logits) whatever the dtype of the logits, and
so are results: in half precision they are closer to the truth than those of TRL's route without
Triton, which rounds them to the logits' dtype. Masked columns of -inf count 0, never NaN, and an
index of -100 or outside the vocabulary is NaN, never another token's number.

R rows of logits, V vocabulary.
"""

import torch
from torch import Tensor

from sharpen.errors import InputError
from sharpen_kernels import TokenStats, token_logprob
from sharpen_kernels.stats import Statistic

NO_TOKEN = -1  # outside every vocabulary, and not what the kernel takes for "not scored"


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probs, in nats, of `index` under the softmax of `logits`; differentiable in them.

        logprob = (logits / temperature).log_softmax(-1).gather(-1, index)

    Args:
        logits: [..., V].
        index: [...], or [..., K] for K ids a row.
        temperature: Divides the logits; above 0.
        row_mask: Of the shape of `index`. Where it is 0 a row is not read: 0, and no gradient.

    Returns:
        fp32 (fp64 for fp64 logits), of the shape of `index`.

    Raises:
        InputError: If a shape is not as above, or the temperature is not above 0.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, -torch.inf]])
        >>> selective_log_softmax(logits, torch.tensor([1, 0]))
        tensor([-0.6931,  0.0000])
    """
    found = _stats(logits, index, temperature, row_mask, ("logprob",))
    assert found.logprob is not None
    return found.logprob.view(index.shape)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_log_softmax` and the entropy, in nats, of each row, in the same read.

    Args:
        logits: [..., V].
        index: [...], one id a row.
        entropy_requires_grad: Let gradients through the entropy.
        temperature: As above; of the entropy too.
        row_mask: As above; of the entropy too.

    Raises:
        InputError: As `selective_log_softmax`.
    """
    if index.shape != logits.shape[:-1]:
        raise InputError(
            f"`index` must be one id a row, {tuple(logits.shape[:-1])}, got {tuple(index.shape)}."
        )
    found = _stats(logits, index, temperature, row_mask, ("logprob", "entropy"))
    assert found.logprob is not None
    assert found.entropy is not None
    entropy = found.entropy if entropy_requires_grad else found.entropy.detach()
    return found.logprob.view(index.shape), entropy.view(index.shape)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy, in nats, of the softmax of each row of `logits` [..., V]; differentiable.

    Args:
        logits: [..., V].
        chunk_size: Of TRL's; rows are read one by one here, so it changes nothing.

    Example:
        >>> entropy_from_logits(torch.zeros(2, 4))
        tensor([1.3863, 1.3863])
    """
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = _stats(logits, index, 1.0, None, ("entropy",)).entropy
    assert entropy is not None
    return entropy.view(index.shape)


def _stats(
    logits: Tensor,
    index: Tensor,
    temperature: float,
    row_mask: Tensor | None,
    stats: tuple[Statistic, ...],
) -> TokenStats:
    if temperature <= 0:
        raise InputError(f"`temperature` must be above 0, got {temperature}.")
    rows_shape = logits.shape[:-1]
    if index.shape != rows_shape and index.shape[:-1] != rows_shape:
        raise InputError(
            f"`index` must be {tuple(rows_shape)} or that with one more dimension, for logits of "
            f"shape {tuple(logits.shape)}; got {tuple(index.shape)}."
        )
    if row_mask is not None and row_mask.shape != index.shape:
        raise InputError(
            f"`row_mask` must be of the shape of `index`, {tuple(index.shape)}, got "
            f"{tuple(row_mask.shape)}."
        )
    V = logits.shape[-1]
    flat_RV = logits.reshape(-1, V)
    target_S = index.reshape(-1).long()
    # else -100 would count as "not scored" and be 0
    target_S = torch.where((target_S >= 0) & (target_S < V), target_S, NO_TOKEN)
    if row_mask is not None:
        target_S = torch.where(row_mask.reshape(-1) != 0, target_S, -100)
    K = 1 if index.shape == rows_shape else index.shape[-1]
    rows_S = None
    if K != 1:
        rows_S = torch.arange(len(flat_RV), device=logits.device).repeat_interleave(K)
    return token_logprob(flat_RV, target_S, rows=rows_S, temperature=temperature, stats=stats)
