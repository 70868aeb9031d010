"""Rated completions to the rows that TRL's trainers read: SFT, DPO, KTO, prompts, token ids.

    sft      prompt, completion                                   the best of each prompt
    dpo      prompt, chosen, rejected, score_chosen, score_rejected      pairs
    kto      prompt, completion, label                            above a threshold; top and bottom
    prompt   prompt                                               for GRPO and RLOO
    tokens   input_ids, completion_mask                           nothing is tokenised again

Each row also says where it comes from (`prompt_id`, `sample_id`, `reward`), which TRL passes over.
Text stands beside text, an assistant's turn beside messages: a template is applied once, by TRL.

G completions of one prompt.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from sharpen.errors import InputError

from .pairs import PairKind, choose_pairs

Row = dict[str, Any]
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Rated:
    """One prompt, its completions and what they are worth.

    Attributes:
        place: Where it stands, for messages.
        prompt_id: Its name.
        prompt: Text or messages.
        completions: Texts.
        reward: Of each; higher is better.
        eligible: False for those that must not be chosen; one whose reward is NaN is none either.
        prompt_ids: Its token ids, where known.
        completion_ids: Token ids of each completion, where known.
    """

    place: str
    prompt_id: str
    prompt: str | Messages
    completions: list[str]
    reward: list[float]
    eligible: list[bool]
    prompt_ids: list[int] | None = None
    completion_ids: list[list[int]] | None = None

    @property
    def ranked(self) -> list[int]:
        """The eligible completions, highest reward first, the first of equals first."""
        able = [g for g, ok in enumerate(self.eligible) if ok]
        return sorted(able, key=lambda g: -self.reward[g])

    def said(self, g: int) -> str | Messages:
        """Completion g in the form of its prompt."""
        text = self.completions[g]
        return text if isinstance(self.prompt, str) else [{"role": "assistant", "content": text}]


def sft_rows(group: Rated, *, top: int = 1) -> Iterator[Row]:
    """The `top` best completions of a prompt.

    Example:
        >>> group = Rated("f:1", "p", "2 + 2 =", [" 5", " 4"], [-3.0, -1.0], [True, True])
        >>> next(sft_rows(group))["completion"]
        ' 4'
    """
    for g in group.ranked[:top]:
        yield {"prompt": group.prompt, "completion": group.said(g), **_source(group, g)}


def token_rows(group: Rated, *, top: int = 1) -> Iterator[Row]:
    """The same as token ids; `completion_mask` is 1 on those of the completion.

    Raises:
        InputError: If the ids are not known.
    """
    for g in group.ranked[:top]:
        if group.prompt_ids is None or group.completion_ids is None:
            raise InputError(
                f"{group.place}: `shape` tokens needs `prompt_ids` and `completion_ids`; "
                "score a file of `sharpen sample`, which has them."
            )
        prompt, completion = group.prompt_ids, group.completion_ids[g]
        yield {
            "input_ids": prompt + completion,
            "completion_mask": [0] * len(prompt) + [1] * len(completion),
            **_source(group, g),
        }


def dpo_rows(
    group: Rated, generator: torch.Generator, *, pairs: PairKind = "best_worst", margin: float = 0.0
) -> Iterator[Row]:
    """Pairs whose rewards differ by more than `margin`, the better one chosen.

    Args:
        group: Of one prompt.
        generator: For `pairs="random"`.
        pairs: As in `choose_pairs`.
        margin: At least 0: of equals, none is to be preferred.
    """
    keys = [_key(group, g) for g in range(len(group.completions))]
    for i, j in choose_pairs(pairs, group.reward, group.eligible, generator, keys):
        if group.reward[i] - group.reward[j] > margin:
            yield {
                "prompt": group.prompt,
                "chosen": group.said(i),
                "rejected": group.said(j),
                "score_chosen": group.reward[i],
                "score_rejected": group.reward[j],
                "prompt_id": group.prompt_id,
                "chosen_sample_id": i,
                "rejected_sample_id": j,
            }


def kto_rows(
    group: Rated, *, threshold: float | None = None, share: float | None = None
) -> Iterator[Row]:
    """Completions that are good or bad, by themselves.

        threshold:  label = reward >= threshold, of every completion
        share:      the best `share` of a prompt's completions, at least one, are good, as many of
                    the worst are bad, the rest is left out; and so is what is not better, or not
                    worse, than every one of the other kind

    Args:
        group: Of one prompt.
        threshold: In units of the reward.
        share: In (0, 0.5].
    """
    ranked = group.ranked
    if threshold is not None:
        label = {g: group.reward[g] >= threshold for g in ranked}
    else:
        assert share is not None
        # rounding must not lose a whole one: 0.29 * 100 is 28.999...
        k = max(1, int(share * len(ranked) + 1e-9))
        good, bad = (ranked[:k], ranked[-k:]) if len(ranked) > 1 else ([], [])
        low = min((group.reward[g] for g in good), default=0.0)
        high = max((group.reward[g] for g in bad), default=0.0)
        label = {g: True for g in good if group.reward[g] > high}
        label |= {g: False for g in bad if group.reward[g] < low}
    for g in sorted(label):
        row = {"prompt": group.prompt, "completion": group.said(g), "label": label[g]}
        yield row | _source(group, g)


def prompt_rows(group: Rated) -> Iterator[Row]:
    """The prompt alone."""
    yield {"prompt": group.prompt, "prompt_id": group.prompt_id}


def unique(group: Rated) -> Rated:
    """Equal completions count once: all but the first eligible one are not eligible."""
    seen: set[Any] = set()
    eligible = []
    for g, ok in enumerate(group.eligible):
        key = _key(group, g)
        eligible.append(ok and key not in seen)
        if ok:
            seen.add(key)
    return replace(group, eligible=eligible)


def _key(group: Rated, g: int) -> Hashable:
    """What completions are told apart by: ids, or text where they are not known."""
    return group.completions[g] if group.completion_ids is None else tuple(group.completion_ids[g])


def _source(group: Rated, g: int) -> Row:
    return {"prompt_id": group.prompt_id, "sample_id": g, "reward": group.reward[g]}
