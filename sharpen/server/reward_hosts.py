"""Routes of trainers that ask a server for one number a text.

OpenRLHF, `/get_reward`: {"query": [text], "prompts": [text], "labels": [...]} to {"rewards": [x],
"scores": [x], "extra_logs": {name: [x]}}; it sends one query a request.
LLaMA-Factory, `/v1/score/evaluation`: {"model": ..., "messages": [text]} to {"scores": [x]}; a text
is a whole conversation as the chat template wrote it.

Both send what they decoded from ids with its special tokens, so none are added here.
"""

from collections.abc import Sequence
from typing import Any

from sharpen_kernels import TokenStats

from .dialect import Answer, Asked, Desk, refuse_broken, scores_of, stats_of
from .fields import as_object, texts, wrong
from .jobs import Job
from .refusal import RefusedError

# of every completion, beside the reward
LOGS = ("logprob", "mean_logprob")


def read_get_reward(body: object, desk: Desk) -> Asked:
    """What OpenRLHF asks for.

    Raises:
        SharpenError: If it is malformed, beyond a limit, or nothing the model can read.
    """
    fields = as_object(body)
    queries = texts(fields, "query")
    prompts = texts(fields, "prompts")
    if len(prompts) != len(queries):
        raise wrong("prompts", f"a list of {len(queries)}, one a query", f"{len(prompts)} of them")
    desk.limits.check_n("query", len(queries))
    pairs = [
        desk.texts.split(query, prompt, f"query[{i}]")
        for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True))
    ]
    jobs = _jobs(pairs, "query", desk)

    def answer(results: Sequence[TokenStats]) -> Answer:
        rewards, logs = _rewards(jobs, results, "query", desk.reward)
        return {"rewards": rewards, "scores": rewards, "extra_logs": logs}

    return desk.check(Asked(jobs, answer))


def read_evaluation(body: object, desk: Desk) -> Asked:
    """What LLaMA-Factory asks for.

    Raises:
        SharpenError: As `read_get_reward`.
    """
    whole = texts(as_object(body), "messages")
    desk.limits.check_n("messages", len(whole))
    pairs = [desk.texts.split_last(text, f"messages[{i}]") for i, text in enumerate(whole)]
    jobs = _jobs(pairs, "messages", desk)

    def answer(results: Sequence[TokenStats]) -> Answer:
        rewards, _ = _rewards(jobs, results, "messages", desk.reward)
        return {"object": "score.evaluation", "model": desk.name, "scores": rewards}

    return desk.check(Asked(jobs, answer))


def _jobs(pairs: Sequence[tuple[list[int], list[int]]], field: str, desk: Desk) -> list[Job]:
    stats = stats_of([desk.reward, *LOGS])
    for i, (prompt, completion) in enumerate(pairs):
        desk.model.check(f"{field}[{i}]", prompt, completion)
    return [Job(prompt, [completion], stats) for prompt, completion in pairs]


def _rewards(
    jobs: Sequence[Job], results: Sequence[TokenStats], field: str, reward: str
) -> tuple[list[float], dict[str, Any]]:
    """Reward of each job, which has one completion, and what to log."""
    rewards: list[float] = []
    logs: dict[str, list[float]] = {name: [] for name in (*LOGS, "n_tokens")}
    for i, (job, tokens) in enumerate(zip(jobs, results, strict=True)):
        assert tokens.logprob is not None
        # these hosts read numbers alone
        refuse_broken(f"{field}[{i}]", tokens.logprob)
        scores = scores_of(job, tokens)
        value = scores.reward(reward)
        if not value.isfinite():
            raise RefusedError(
                422, f"`{field}[{i}]`: {reward} is {value.item()}.", code="not_finite"
            )
        rewards.append(value.item())
        for name in LOGS:
            logs[name].append(scores.reward(name).item())
        logs["n_tokens"].append(float(len(tokens.logprob)))
    return rewards, logs
