"""`/score`: one prompt, N completions, to rewards and the statistics of their tokens.

    {"prompt": text | ids | messages, "completions": [text | ids, ...],
     "rewards": ["logprob"], "token_stats": [], "add_special_tokens": true, "add_eos": false,
     "answers": null, "valid": null}

    {"model": ..., "rewards": {name: [N]}, "n_tokens": [N], "offsets": [N + 1],
     "token_stats": {name: [S]}, "errors": [N]}

Completion n owns the tokens offsets[n] ... offsets[n + 1] - 1 of each statistic, as in `Scores`.
An error is null, or says why the log-prob of its completion is not finite.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sharpen.scoring.rewards import REWARDS, options_needed
from sharpen_kernels import TokenStats
from sharpen_kernels.stats import NAMES

from .dialect import Answer, Asked, Desk, broken, scores_of, stats_of
from .fields import Body, as_object, boolean, chosen, wrong
from .jobs import Job

FIELDS = (
    "prompt", "completions", "rewards", "token_stats", "add_special_tokens", "add_eos",
    "answers", "valid", "model",
)  # fmt: skip


def read_score(body: object, desk: Desk) -> Asked:
    """What a request asks for.

    Raises:
        SharpenError: If it is malformed, beyond a limit, or nothing the model can read.
    """
    fields = as_object(body, FIELDS)
    values = fields.get("completions")
    if not isinstance(values, list):
        raise wrong("completions", "a list of texts, or of lists of token ids", values)
    desk.limits.check_n("completions", len(values))
    rewards = chosen(fields, "rewards", ["logprob"], tuple(REWARDS))
    stats = chosen(fields, "token_stats", [], NAMES)
    special = boolean(fields, "add_special_tokens", True)
    end = desk.texts.eos() if boolean(fields, "add_eos", False) else []
    prompt = desk.texts.prompt_ids(fields.get("prompt"), special=special)
    desk.model.check("prompt", prompt)
    # before each completion is checked with it
    desk.limits.check_tokens(len(prompt))
    completions = []
    for i, value in enumerate(values):
        ids = desk.texts.ids(value, f"completions[{i}]", special=False)
        # the end of a completion given as ids is in its ids
        ids = [*ids, *end] if isinstance(value, str) else ids
        # as in the scorer: the last token is predicted, and never read
        desk.model.check(f"completions[{i}]", prompt, ids, unread=min(1, len(ids)))
        completions.append(ids)
    job = Job(prompt, completions, stats_of(rewards, stats))
    options = _options(fields, rewards, job)
    valid = _one_each(fields, "valid", bool, len(values))

    def answer(results: Sequence[TokenStats]) -> Answer:
        (tokens,) = results
        scores = scores_of(job, tokens, valid)
        assert tokens.logprob is not None
        offsets = scores.offsets.tolist()
        return {
            "model": desk.name,
            "rewards": {r: scores.reward(r, **options[r]).numpy() for r in rewards},
            "n_tokens": scores.offsets.diff().numpy(),
            "offsets": scores.offsets.numpy(),
            "token_stats": {name: getattr(tokens, name).numpy() for name in stats},
            "errors": [broken(tokens.logprob[a:b]) for a, b in pairwise(offsets)],
        }

    return desk.check(Asked([job], answer))


def _options(fields: Body, rewards: Sequence[str], job: Job) -> dict[str, dict[str, Any]]:
    """What each reward wants beside statistics: answers of the request, keys of the ids."""
    answers = _one_each(fields, "answers", (str, type(None)), len(job.completions))
    options = {}
    for reward in rewards:
        needed = options_needed(reward)
        if "answers" in needed and answers is None:
            fix = f"the reward {reward} votes on them"
            raise wrong("answers", "a list of one answer or null per completion", None, fix)
        given = {"answers": answers, "keys": [tuple(ids) for ids in job.completions]}
        options[reward] = {name: given[name] for name in needed}
    return options


# what the list holds is what `kind` says
def _one_each(fields: Body, field: str, kind: Any, n: int) -> list[Any] | None:
    values = fields.get(field)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != n:
        got = f"{len(values)} of them" if isinstance(values, list) else values
        raise wrong(field, f"a list of {n}, one a completion", got)
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise wrong(f"{field}[{i}]", "true or false" if kind is bool else "text or null", value)
    return values
