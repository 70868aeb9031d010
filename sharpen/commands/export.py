"""`sharpen export`: scored samples to the data sets that TRL's trainers take, chosen by a reward.

    sft      prompt, completion                                   the best of each prompt
    dpo      prompt, chosen, rejected, score_chosen, score_rejected      pairs
    kto      prompt, completion, label                            above a threshold; top and bottom
    prompt   prompt                                               for GRPO and RLOO
    tokens   input_ids, completion_mask                           nothing is tokenised again

Each row also says where it comes from (`prompt_id`, `sample_id`, `reward`), which TRL passes over.
Text stands beside text, an assistant's turn beside messages: a template is applied once, by TRL.
The same input and options make the same file.

    run, check, rows_of     the command
    sft_rows, ...           one prompt to the rows of each shape
    read_rated              a file of `sharpen score` or `sharpen sample` to `Rated` prompts
"""

import sys
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from sharpen.ends import is_natural
from sharpen.errors import InputError, RecordError, check_fields
from sharpen.records import (
    Messages,
    PromptRecord,
    Row,
    check_completions,
    check_ids,
    check_prompt,
    check_table,
    check_text,
    completion_as,
    content_id,
    file_digest,
    has,
    read_prompts,
    read_rows,
    write_table,
)
from sharpen.runs import Run
from sharpen.scoring import Scores
from sharpen.scoring.rewards import REWARDS, missing_inputs, stats_needed
from sharpen.training.groups import PairKind, choose_pairs
from sharpen_kernels import TokenStats

from .options import ExportConfig
from .stages import numbers, settings_beside

CHOOSING = ("sft", "dpo", "kto", "tokens")
# options that belong to some shapes alone
OWN = {
    "top": ("sft", "tokens"),
    "pairs": ("dpo",),
    "margin": ("dpo",),
    "seed": ("dpo",),
    "threshold": ("kto",),
    "share": ("kto",),
    "reward": CHOOSING,
    "unique": CHOOSING,
    "cut": CHOOSING,
}


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

    def completion(self, g: int) -> str | Messages:
        """Completion g in the form of its prompt."""
        return completion_as(self.prompt, self.completions[g])

    def key(self, g: int) -> Hashable:
        """What completions are told apart by: ids, or text where they are not known."""
        ids = self.completion_ids
        return self.completions[g] if ids is None else tuple(ids[g])

    def source(self, g: int) -> Row:
        """Where a row of completion g comes from."""
        return {"prompt_id": self.prompt_id, "sample_id": g, "reward": self.reward[g]}


def run(config: ExportConfig) -> None:
    """Run the command; where the same one was finished before, it writes the same file again."""
    check(config)
    out = Path(config.out)
    check_table(out)
    groups = read_rated(config.input, config.reward, cut=config.cut)
    digests = {"input_digest": file_digest(config.input)}
    if config.prompts is not None:
        groups = with_prompts(groups, read_prompts(config.prompts), config.prompts)
        digests["prompts_digest"] = file_digest(config.prompts)
    if config.unique:
        groups = [unique(group) for group in groups]
    check_one_form(groups)
    rows = list(rows_of(config, groups))
    if not rows:
        raise InputError(
            f"{config.input!r} must leave at least one row of shape {config.shape}, got none of "
            f"{len(groups)} prompts; lower `--margin`, or take cut ones with `--cut`."
        )
    settings = {"command": "export", **asdict(config), **digests}
    with Run(settings_beside(out), settings, [out]):
        write_table(out, rows)
    used = len({row["prompt_id"] for row in rows})
    sys.stdout.write(f"{len(rows)} rows of {used} of {len(groups)} prompts: {config.out}\n")


def check(config: ExportConfig) -> None:
    """Reject options that contradict each other, or would change nothing."""
    for name, shapes in OWN.items():
        given, default = getattr(config, name), ExportConfig.__dataclass_fields__[name].default
        if config.shape not in shapes and given != default:
            raise InputError(
                f"`{name}` must be left out with `--shape {config.shape}`, which it cannot change, "
                f"got {given!r}."
            )
    if config.shape != "prompt" and config.reward is None:
        raise InputError(f"`reward` must be given with `--shape {config.shape}`, got none.")
    known, share = config.threshold, config.share
    rules = [
        ("top", config.top >= 1, "at least 1"),
        ("margin", isfinite(config.margin) and config.margin >= 0, "at least 0"),
        ("threshold", known is None or isfinite(known), "a number"),
        ("share", share is None or 0 < share <= 0.5, "above 0 and at most 0.5"),
    ]
    check_fields(config, rules)
    if config.seed and config.pairs != "random":
        raise InputError(
            f"`seed` must be left out with `--pairs {config.pairs}`: nothing is drawn."
        )
    if config.shape == "kto" and (config.threshold is None) == (config.share is None):
        got = "neither" if config.share is None else "both"
        raise InputError(f"give one of `--threshold` and `--share` with `--shape kto`, got {got}.")
    if Path(config.out).resolve() == Path(config.input).resolve():
        raise InputError(f"`out` must be another file than `input`, got {config.out!r} for both.")


def check_one_form(groups: list[Rated]) -> None:
    """Reject text beside messages: a column of a data set has one type."""
    for group in groups:
        if isinstance(group.prompt, str) != isinstance(groups[0].prompt, str):
            raise RecordError(
                f"{group.place}: prompts must all be text or all messages, got the other than at "
                f"{groups[0].place}; export them to two files."
            )


def rows_of(config: ExportConfig, groups: list[Rated]) -> Iterator[Row]:
    """The rows of every prompt, in order."""
    generator = torch.Generator().manual_seed(config.seed)
    seen: set[str] = set()
    for group in groups:
        if config.shape == "sft":
            yield from sft_rows(group, top=config.top)
        elif config.shape == "tokens":
            yield from token_rows(group, top=config.top)
        elif config.shape == "dpo":
            yield from dpo_rows(group, generator, pairs=config.pairs, margin=config.margin)
        elif config.shape == "kto":
            yield from kto_rows(group, threshold=config.threshold, share=config.share)
        elif group.prompt_id not in seen:
            seen.add(group.prompt_id)
            yield from prompt_rows(group)


def unique(group: Rated) -> Rated:
    """Equal completions count once: all but the first eligible one are not eligible."""
    seen: set[Any] = set()
    eligible = []
    for g, ok in enumerate(group.eligible):
        key = group.key(g)
        eligible.append(ok and key not in seen)
        if ok:
            seen.add(key)
    return replace(group, eligible=eligible)


def sft_rows(group: Rated, *, top: int = 1) -> Iterator[Row]:
    """The `top` best completions of a prompt.

    Example:
        >>> group = Rated("f:1", "p", "2 + 2 =", [" 5", " 4"], [-3.0, -1.0], [True, True])
        >>> next(sft_rows(group))["completion"]
        ' 4'
    """
    for g in group.ranked[:top]:
        yield {"prompt": group.prompt, "completion": group.completion(g), **group.source(g)}


def token_rows(group: Rated, *, top: int = 1) -> Iterator[Row]:
    """The same as token ids; `completion_mask` is 1 on those of the completion."""
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
            **group.source(g),
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
    keys = [group.key(g) for g in range(len(group.completions))]
    for i, j in choose_pairs(pairs, group.reward, group.eligible, generator, keys):
        if group.reward[i] - group.reward[j] > margin:
            yield {
                "prompt": group.prompt,
                "chosen": group.completion(i),
                "rejected": group.completion(j),
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
        row = {"prompt": group.prompt, "completion": group.completion(g), "label": label[g]}
        yield row | group.source(g)


def prompt_rows(group: Rated) -> Iterator[Row]:
    """The prompt alone."""
    yield {"prompt": group.prompt, "prompt_id": group.prompt_id}


def read_rated(path: str, reward: str | None, *, cut: bool) -> list[Rated]:
    """Every prompt of a file with its rated completions, in the order of their first records.

    Args:
        path: JSON lines, of `sharpen score` or `sharpen sample`.
        reward: Its name; None: completions are not rated and not looked at.
        cut: Whether completions that were cut at the token limit may be chosen.
    """
    prompts: list[list[Rated]] = []
    singles: dict[str, list[Rated]] = {}
    for place, row in read_rows(path):
        group = _rated(place, row, reward, cut)
        together = singles.get(group.prompt_id) if has(row, "completion") else None
        if together is None:
            # its place in the order of the file is that of its first record
            prompts.append([group])
            if has(row, "completion"):
                singles[group.prompt_id] = prompts[-1]
            continue
        if together[0].prompt != group.prompt:
            raise RecordError(
                f"{place}: `prompt_id` {group.prompt_id!r} must belong to one prompt, got another "
                f"at {together[0].place}."
            )
        together.append(group)
    return [_joined(parts) for parts in prompts]


def with_prompts(
    groups: Iterable[Rated], records: Iterable[PromptRecord], path: str
) -> list[Rated]:
    """The groups with the prompts that they were drawn from, which may be messages."""
    given = {record.id: record.prompt for record in records}
    found = []
    for group in groups:
        if group.prompt_id not in given:
            raise RecordError(
                f"{group.place}: `prompt_id` {group.prompt_id!r} must be in {path!r}; give the "
                "file that the samples were drawn from."
            )
        found.append(replace(group, prompt=given[group.prompt_id]))
    return found


def _rated(place: str, row: Row, reward: str | None, cut: bool) -> Rated:
    prompt = check_prompt(place, row)
    given = row.get("prompt_id")
    prompt_id = content_id(prompt) if given is None else check_text(place, "prompt_id", given)
    if reward is None:
        return Rated(place, prompt_id, prompt, [], [], [])
    texts = check_completions(place, row)
    row = _with_lists(row)
    ids = None
    if row.get("completion_ids") is not None:
        lists = _listed(place, "completion_ids", row["completion_ids"], len(texts))
        ids = [check_ids(place, "completion_ids", x) for x in lists]
    prompt_ids = row.get("prompt_ids")
    if prompt_ids is not None:
        check_ids(place, "prompt_ids", prompt_ids)
    rewards = _rewards(place, row, reward, len(texts))
    able = [bool(text) and isfinite(r) for text, r in zip(texts, rewards, strict=True)]
    if row.get("finish_reasons") is not None and not cut:
        ends = _listed(place, "finish_reasons", row["finish_reasons"], len(texts))
        able = [ok and is_natural(end) for ok, end in zip(able, ends, strict=True)]
    return Rated(place, prompt_id, prompt, texts, rewards, able, prompt_ids, ids)


def _with_lists(row: Row) -> Row:
    """A record of one `completion` as one of several holds it: in lists of one."""
    if not has(row, "completion"):
        return row
    names = {"completion_ids": "completion_ids", "logprobs": "logprobs"}
    names["finish_reason"] = "finish_reasons"
    lists: Row = {many: [row[one]] for one, many in names.items() if row.get(one) is not None}
    for name in ("rewards", "token_stats"):
        if isinstance(row.get(name), dict):
            lists[name] = {key: [value] for key, value in row[name].items()}
    return row | lists


# a field of a record: whatever JSON holds
def _listed(place: str, name: str, values: Any, n: int) -> list[Any]:
    if not isinstance(values, list) or len(values) != n:
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise RecordError(
            f"{place}: `{name}` must be a list of {n} entries, one a completion, got {got}."
        )
    return values


def _rewards(place: str, row: Row, reward: str, n: int) -> list[float]:
    """The rewards that a record holds, or that follow from its token statistics."""
    known = row.get("rewards")
    if isinstance(known, dict) and reward in known:
        values = _listed(place, f"rewards.{reward}", known[reward], n)
        if not all(map(_is_number, values)):
            raise RecordError(f"{place}: `rewards.{reward}` must hold numbers or null.")
        return numbers(values)
    stats = _statistics(place, row, n)
    if reward not in REWARDS or missing_inputs(reward, stats=stats):
        raise RecordError(
            f"{place}: `reward` {reward!r} must be among its rewards "
            f"({', '.join(known or {}) or 'none'}) or follow from its token statistics "
            f"({', '.join(stats) or 'none'}); run `sharpen score --rewards {reward}` first."
        )
    needed = {name: stats[name] for name in stats_needed(reward)}
    for name, nested in needed.items():
        if not all(isinstance(x, list) and all(map(_is_number, x)) for x in nested):
            raise RecordError(
                f"{place}: `{name}` must hold a list for each completion, of a number or null for "
                "each token."
            )
    lengths = [len(tokens) for tokens in next(iter(needed.values()))]
    for name, nested in needed.items():
        if [len(tokens) for tokens in nested] != lengths:
            raise RecordError(
                f"{place}: `{name}` must be as long as the other token statistics of a completion."
            )
    columns = {
        name: torch.tensor([x for tokens in nested for x in numbers(tokens)]).float()
        for name, nested in needed.items()
    }
    return Scores.of(TokenStats(**columns), [lengths]).reward(reward).tolist()


def _statistics(place: str, row: Row, n: int) -> dict[str, list[list[Any]]]:
    kept = row.get("token_stats")
    found = dict(kept) if isinstance(kept, dict) else {}
    if "logprob" not in found and row.get("logprobs") is not None:
        found["logprob"] = row["logprobs"]
    return {name: _listed(place, name, value, n) for name, value in found.items()}


def _is_number(x: object) -> bool:
    return x is None or (isinstance(x, (int, float)) and not isinstance(x, bool))


def _joined(parts: list[Rated]) -> Rated:
    """The records of a prompt as one group."""
    ids = [part.completion_ids for part in parts]
    return replace(
        parts[0],
        completions=[text for part in parts for text in part.completions],
        reward=[reward for part in parts for reward in part.reward],
        eligible=[ok for part in parts for ok in part.eligible],
        completion_ids=None if None in ids else [x for part in ids for x in part or []],
    )
