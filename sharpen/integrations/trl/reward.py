"""A model's own probabilities as the reward of GRPO and RLOO.

One object is both the reward function and a `transformers.TrainerCallback`, which is how it comes
to know the model that is trained:

    reward = SelfReward("mean_logprob", under="base")
    GRPOTrainer(model, reward_funcs=reward, callbacks=[reward], ...)

It scores `completion_ids`, the tokens that were sampled, and never text that is tokenised again.
A prompt is computed once for its completions. N completions of a call, P groups of equal prompts.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from sharpen.errors import InputError
from sharpen.scoring.rewards import options_needed, stats_needed
from sharpen.scoring.scores import Scores

from .grouped import cut, group_deviation, group_sizes, normalised
from .judge import Judge
from .prompt_tokens import NAMES as PROMPT_NAMES
from .prompt_tokens import prompt_tokens
from .sampler_logprobs import sampler_logprobs
from .trainer_facts import Facts

logger = logging.getLogger(__name__)

TEXT_NEEDS = ("answers", "keys")  # options that are made of completions


class SelfReward(TrainerCallback):
    """Rewards completions by any reward of `sharpen.scoring.rewards`, one float each.

    A completion that cannot be scored gets None, which TRL leaves out: an empty one, one of NaN
    log-probs, a reward that is not finite.

    Args:
        reward: "logprob", "mean_logprob", "self_certainty", "neg_entropy", "majority", ...
        under: Whose probabilities: "policy" (live), "reference", "base" (frozen), or a model of
            one's own, loaded or by path; see `Judge`.
        normalize: Subtract the mean of the group of equal prompts that follow one another, and
            divide by its deviation.
        answer: From a completion's text to its answer, None for none; for rewards that vote.
        options: What the reward takes beside, such as `window`.
        tokenizer: Of prompts; default: the trainer's.
        template: What the chat template is called with beside the messages; default: the trainer's
            `chat_template_kwargs`.
        max_tokens: Of one forward.

    Raises:
        InputError: If there is no such reward, or it votes and `answer` is missing.
    """

    # models, tokenizers and options are what transformers and the rewards take
    def __init__(
        self,
        reward: str = "logprob",
        *,
        under: Any = "policy",
        normalize: bool = False,
        answer: Callable[[str], str | None] | None = None,
        options: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        template: Mapping[str, Any] | None = None,
        max_tokens: int = 16384,
    ):
        needed = options_needed(reward)
        if "answers" in needed and answer is None:
            raise InputError(
                f"`reward` {reward} votes on answers and needs `answer=`, got none; pass a "
                "function from a completion's text to its answer."
            )
        missing = [name for name in needed if name not in (*TEXT_NEEDS, *(options or {}))]
        if missing:
            raise InputError(f"`options` of {reward} must hold {missing[0]!r}, got none.")
        self.reward = reward
        self.normalize = normalize
        self.answer = answer
        self.options = dict(options or {})
        self.tokenizer = tokenizer
        self.template = template
        self.judge = Judge(under, max_tokens)
        self.facts = Facts()
        # what TRL calls its columns of metrics
        self.__name__ = f"self_reward_{reward}"

    # as TrainerCallback
    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Meet the trainer; keep the base before anything changes it."""
        self.facts.meet(args, given)
        if given.get("model") is not None:
            self.judge.keep(given["model"])

    # as TrainerCallback
    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Meet the trainer's model."""
        self.facts.meet(args, given)

    # whatever a trainer knows
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **given: Any,
    ) -> list[float | None]:
        """One reward a completion, in their order, or None.

        Args:
            prompts: Text or messages, one a completion; those that are equal and follow one
                another are a group.
            completions: Text or messages; read by `answer` alone.
            completion_ids: Token ids as they were sampled.
            **given: What else the trainer passes. `prompt_ids` are taken instead of `prompts`;
                `completion_logprobs` of a rollout instead of a forward, where the reward is made
                of the policy's log-probs alone; `log_metric` gets the mean, the deviation within
                groups and the share that was not scored.

        Raises:
            InputError: If `completion_ids` are missing, or something that was asked for is.
        """
        ids = _checked(completion_ids, len(prompts))
        facts = self.facts.seen(given)
        prompt_ids = _prompt_ids(given, len(prompts))
        sizes = group_sizes(prompts if prompt_ids is None else prompt_ids)
        if self._looks_at_groups:
            facts.check_whole(sizes)
        scores = self._from_sampler(given, ids, sizes)
        if scores is None:
            firsts = [group[0] for group in cut(range(len(prompts)), sizes)]
            if prompt_ids is None:
                template = facts.template if self.template is None else self.template
                tokenizer = self.tokenizer or facts.tokenizer
                facts.check_rendered_here()
                heads = prompt_tokens([prompts[i] for i in firsts], tokenizer, template)
            else:
                heads = [prompt_ids[i] for i in firsts]
            with self.judge.scorer(facts.model, facts.ref_model, facts.step) as scorer:
                scores = scorer.score(heads, cut(ids, sizes), stats=stats_needed(self.reward))
        return self._rewards(scores, completions, ids, given.get("log_metric"))

    @cached_property
    def _looks_at_groups(self) -> bool:
        return self.normalize or "answers" in options_needed(self.reward)

    def _from_sampler(
        self, given: Mapping[str, Any], ids: list[list[int]], sizes: list[int]
    ) -> Scores | None:
        if self.judge.role != "policy" or not set(stats_needed(self.reward)) <= {"logprob"}:
            return None
        found = sampler_logprobs(given, ids)
        return None if found is None else Scores.from_logprobs(cut(found, sizes))

    def _rewards(
        self,
        scores: Scores,
        completions: Sequence[Any],
        ids: list[list[int]],
        log_metric: Callable[[str, float], None] | None,
    ) -> list[float | None]:
        options = dict(self.options)
        for name in options_needed(self.reward):
            if name == "answers":
                assert self.answer is not None, "checked at construction"
                options[name] = [self.answer(_text(completion)) for completion in completions]
            elif name == "keys":
                options[name] = [tuple(row) for row in ids]
        raw_N = scores.reward(self.reward, **options)
        # an empty completion would score 0 nats, above every other
        raw_N = raw_N.masked_fill(scores.offsets.diff() == 0, math.nan)
        self._log(raw_N, scores, log_metric)
        reward_N = normalised(raw_N, scores.groups) if self.normalize else raw_N
        return [x if math.isfinite(x) else None for x in reward_N.tolist()]

    def _log(self, reward: Tensor, scores: Scores, log_metric: Any) -> None:
        if log_metric is None:
            return
        finite = reward[reward.isfinite()]
        name = f"self_reward/{self.reward}"
        if len(finite):
            log_metric(f"{name}/mean", finite.mean().item())
            log_metric(f"{name}/group_std", group_deviation(reward, scores.groups))
        log_metric(f"{name}/unscored", 1 - len(finite) / max(len(reward), 1))


def _checked(completion_ids: Sequence[Sequence[int]] | None, N: int) -> list[list[int]]:
    if completion_ids is None:
        raise InputError(
            "`completion_ids` must come with the completions, got none; text that is tokenised "
            "again need not be the tokens that were sampled."
        )
    if len(completion_ids) != N:
        raise InputError(
            f"`completion_ids` must hold one list for each of {N} prompts, "
            f"got {len(completion_ids)}."
        )
    return [list(ids) for ids in completion_ids]


# whatever a trainer passes
def _prompt_ids(given: Mapping[str, Any], N: int) -> list[list[int]] | None:
    """Token ids of each prompt, where they came along: lists, or arrays and tensors."""
    for name in PROMPT_NAMES:
        rows = given.get(name)
        # the truth of a tensor is an error, and an empty column says nothing
        if rows is None or len(rows) == 0:
            continue
        if len(rows) != N:
            raise InputError(
                f"`{name}` must hold one list for each of {N} completions, got {len(rows)}."
            )
        return [row.tolist() if hasattr(row, "tolist") else list(row) for row in rows]
    return None


def _text(completion: Any) -> str:
    """The text of a completion, or of the last message of one that is messages."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    return content if isinstance(content, str) else ""
