"""What a fused head returns, from prompts that are computed once: no TRL in here.

    padded batch with labels -> prompts and completions -> token statistics -> outputs, padded

A row holds padding on either side of one run of tokens. What stands before its first scored label
is its prompt, what follows up to the last one its completion; labels in between may be left out.

B sequences, L padded length, S labels that are scored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from sharpen.errors import InputError
from sharpen.models import ModelLimits
from sharpen.scoring.model_access import output_layer
from sharpen.scoring.pairs import pair_up
from sharpen.scoring.probe import probe_model
from sharpen.scoring.token_stats import Sharing, scoring_path, shared_or_whole, token_stats
from sharpen_kernels import TokenStats
from sharpen_kernels.linear_logprob import Statistic

if TYPE_CHECKING:
    import transformers

IGNORED = -100
# which statistics each output of TRL's head is made of
NEEDS: dict[str, tuple[Statistic, ...]] = {
    "log_probs": ("logprob",),
    "entropy": ("entropy",),
    "log_sum_sq_probs": ("sum_p2",),
    "mean_logits": ("lse", "self_certainty"),
    "is_top1": ("is_greedy",),
}


class SharedStats:
    """Per-token outputs of a causal LM on padded batches, what rows have in common computed once.

    Args:
        model: A loaded causal LM; its route is found here, by a few tiny forwards.
        temperature: Divides the logits.
        outputs: Names of `NEEDS`; the log-probs are always there.
        max_tokens: Tokens of one packed row. With gradients all rows of a call stay in memory,
            without only one does.

    Raises:
        InputError: If there is no such output, or a number is not above 0.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        *,
        temperature: float = 1.0,
        outputs: Sequence[str] = ("log_probs",),
        max_tokens: int = 16384,
    ):
        unknown = [name for name in outputs if name not in NEEDS]
        if unknown:
            raise InputError(f"`outputs` must be of {', '.join(NEEDS)}, got {unknown[0]!r}.")
        if temperature <= 0 or max_tokens < 1:
            raise InputError(
                f"`temperature` and `max_tokens` must be above 0, got {temperature}, {max_tokens}."
            )
        self.model = model
        self.temperature = temperature
        self.outputs = tuple(dict.fromkeys(["log_probs", *outputs]))
        self.max_tokens = max_tokens
        self.route = probe_model(model, "auto")

    def __call__(
        self, ids: Int64[Tensor, "B L"], mask: Tensor | None, labels: Int64[Tensor, "B L"]
    ) -> dict[str, Tensor]:
        """Outputs by name, [B, L - 1] each, of the labels shifted left; 0 where none is scored.

        `log_probs` and `entropy` are differentiable, in a model that is trained also where nothing
        is scored.

        Raises:
            InputError: As `scored_rows`, and if the model cannot read a row.
        """
        rows = scored_rows(ids, mask, labels)
        limits = ModelLimits.of(self.model)
        pairs = pair_up(limits, rows.prompts, rows.completions)
        needed: dict[Statistic, None] = {
            stat: None for name in self.outputs for stat in NEEDS[name]
        }
        route, head = self.route
        path = scoring_path(self.model, head)

        def run(way: Sharing) -> TokenStats:
            return token_stats(
                path,
                pairs,
                max_tokens=self.max_tokens,
                stats=tuple(needed),
                sharing=way,
                pack_unshared=False,
                temperature=self.temperature,
            )

        tokens = shared_or_whole(run, route.sharing)
        # the input embedding may have more rows, or fewer
        linear = output_layer(self.model)
        n_columns = limits.vocab_size if linear is None else linear.weight.shape[0]
        found = {
            name: scattered(rows, _output(name, tokens, n_columns), ids.shape)
            for name in self.outputs
        }
        if not pairs and torch.is_grad_enabled():
            found["log_probs"] = found["log_probs"] + _zero(self.model)
        return found


def _output(name: str, tokens: TokenStats, n_columns: int) -> Tensor:
    """An output of TRL's head, of the statistics that it is made of."""
    if name == "log_sum_sq_probs":
        assert tokens.sum_p2 is not None
        return tokens.sum_p2.log()
    if name == "mean_logits":
        assert tokens.lse is not None
        assert tokens.self_certainty is not None
        log_V = torch.tensor(float(n_columns)).log()
        return (tokens.lse - tokens.self_certainty).detach() - log_V
    if name == "is_top1":
        assert tokens.is_greedy is not None
        return tokens.is_greedy.bool()
    column_S = getattr(tokens, NEEDS[name][0])
    assert column_S is not None
    return column_S


def _zero(model: nn.Module) -> Tensor:
    """0 that every trained parameter is in: a step without a label is a step of no gradient."""
    parts = [p.flatten()[:1].sum() * 0 for p in model.parameters() if p.requires_grad]
    return torch.stack([x.float() for x in parts]).sum() if parts else torch.zeros(())


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """What a scorer is given, and where its answers go.

    Attributes:
        prompts: Token ids before the first scored label of each row that has one.
        completions: Token ids from there to the last scored label; one a prompt.
        asked: Which completion tokens are scored labels, all completions end to end.
        place: Where each scored label stands in the labels [B, L - 1] that were shifted left by
            one, flattened, in the order of the tokens.
    """

    prompts: list[list[int]]
    completions: list[list[list[int]]]
    asked: Bool[Tensor, " tokens"]
    place: Int64[Tensor, " S"]


def scored_rows(
    ids: Int64[Tensor, "B L"],
    mask: Tensor | None,
    labels: Int64[Tensor, "B L"],
) -> ScoredRows:
    """The rows of a batch whose labels are its own ids, or -100 where none is scored.

    The first column predicts nothing and is predicted by nothing, as in every causal loss.

    Args:
        ids: Token ids, padded on the left, the right or both.
        mask: 1 on tokens, 0 on padding; None for no padding.
        labels: `ids`, or -100.

    Raises:
        InputError: If shapes disagree, padding stands between tokens, a label is another id or
            stands on padding, or the first token of a row that begins late is scored.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    if not ids.shape == mask.shape == labels.shape or ids.ndim != 2:
        raise InputError(
            f"`input_ids`, `attention_mask` and `labels` must be of one shape [B, L], got "
            f"{tuple(ids.shape)}, {tuple(mask.shape)} and {tuple(labels.shape)}."
        )
    is_token_BL = mask.bool()
    is_asked_BL = labels != IGNORED
    is_asked_BL[:, :1] = False
    _check_labels(ids, is_token_BL, labels, is_asked_BL)
    L = ids.shape[1]
    prompts, completions, asked, place = [], [], [], []
    tokens, kept = is_token_BL.tolist(), is_asked_BL.tolist()
    for b, row in enumerate(ids.tolist()):
        columns = [t for t, ask in enumerate(kept[b]) if ask]
        if not columns:
            continue
        begin, first, last = tokens[b].index(True), columns[0], columns[-1]
        if first == begin:
            raise InputError(
                f"`labels`[{b}] must begin after the first token of its row, got a scored label at "
                f"column {first}, which nothing predicts; begin the prompt with BOS or EOS."
            )
        prompts.append(row[begin:first])
        completions.append([row[first : last + 1]])
        asked += kept[b][first : last + 1]
        place += [b * (L - 1) + t - 1 for t in columns]
    return ScoredRows(
        prompts,
        completions,
        torch.tensor(asked, dtype=torch.bool),
        torch.tensor(place, dtype=torch.int64),
    )


def scattered(rows: ScoredRows, values: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of all completion tokens [tokens] as [B, L - 1], 0 where none is scored.

    Differentiable, and of the dtype and device of `values`.
    """
    B, L = shape
    asked_S = values[rows.asked.to(values.device)]
    place_S = rows.place.to(values.device)
    return values.new_zeros(B * (L - 1)).index_put((place_S,), asked_S).view(B, L - 1)


def _check_labels(ids: Tensor, is_token: Tensor, labels: Tensor, is_asked: Tensor) -> None:
    """Reject padding between tokens, and labels that are no continuation of their row."""
    edges_BL = is_token.long().diff(dim=1, prepend=is_token.new_zeros(len(ids), 1).long())
    if bool((edges_BL == 1).sum(dim=1).gt(1).any()):
        raise InputError(
            "`attention_mask` must mark one run of tokens a row, got padding between tokens; "
            "remove it, or leave the tokens there and their labels at -100."
        )
    if bool((is_asked & ~is_token).any()):
        raise InputError(
            "`labels` must be -100 on padding, got a scored label where `attention_mask` is 0."
        )
    if bool((is_asked & (labels != ids)).any()):
        raise InputError(
            "`labels` must be the ids of `input_ids` or -100, got other ids; they cannot be scored "
            "as a continuation."
        )
