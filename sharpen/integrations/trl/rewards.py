"""A model's own probabilities as the reward of GRPO and RLOO.

One object is both the reward function and a `transformers.TrainerCallback`, which is how it comes
to know the model that is trained:

    reward = SelfReward("mean_logprob", under="base")
    GRPOTrainer(model, reward_funcs=reward, callbacks=[reward], ...)

It scores `completion_ids`, the tokens that were sampled, and never text that is tokenised again.
A prompt is computed once for its completions.

`self_reward` needs no code: it is named in a configuration file and set up by its environment.

    # trl grpo --config run.yaml
    reward_funcs: [sharpen.integrations.trl.self_reward]
    env:
      SHARPEN_REWARD: mean_logprob

| variable | holds | default |
|---|---|---|
| SHARPEN_REWARD | the reward | logprob |
| SHARPEN_REWARD_UNDER | policy, reference, base, or a path or hub id | policy |
| SHARPEN_REWARD_NORMALIZE | 1: by group | 0 |
| SHARPEN_REWARD_ANSWER | dotted path of a function from text to its answer | none |
| SHARPEN_REWARD_MAX_TOKENS | tokens of one forward | 16384 |

They are read at the first call. (`integrations/openrlhf.py` reads SHARPEN_REWARD too, as the name
of its own reward.)

N completions of a call, P groups of equal prompts that follow one another.
"""

import copy
import importlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from sharpen.errors import InputError
from sharpen.scoring import Scorer
from sharpen.scoring.rewards import options_needed, stats_needed
from sharpen.scoring.scores import Scores

from .batches import (
    completion_tokens,
    cut,
    given_prompt_tokens,
    group_deviation,
    group_sizes,
    normalised,
    prompt_tokens,
    sampler_logprobs,
)
from .fused_head import bare_forward

# options of a reward that are made of completions
MADE_HERE = ("answers", "keys")
ROLES = ("policy", "reference", "base")
PREFIX = "SHARPEN_REWARD"


class SelfReward(TrainerCallback):
    """Rewards completions by any reward of `sharpen.scoring.rewards`, one float each.

    A completion that cannot be scored gets None, which TRL leaves out: an empty one, one of NaN
    log-probs, a reward that is not finite.

    Args:
        reward: "logprob", "mean_logprob", "self_certainty", "neg_entropy", "majority", ...
        under: Whose probabilities: "policy" (live), "reference", "base" (frozen), or a model of
            one's own, loaded or by path; see `ScorerProvider`.
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
        missing = [name for name in needed if name not in (*MADE_HERE, *(options or {}))]
        if missing:
            raise InputError(f"`options` of {reward} must hold {missing[0]!r}, got none.")
        self.reward = reward
        self.normalize = normalize
        self.answer = answer
        self.options = dict(options or {})
        self.tokenizer = tokenizer
        self.template = template
        self.provider = ScorerProvider(under, max_tokens)
        self.context = TrainerContext()
        # what TRL calls its columns of metrics
        self.__name__ = f"self_reward_{reward}"

    # as TrainerCallback
    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Learn of the trainer; keep the base before anything changes it."""
        self.context.update(args, given)
        if given.get("model") is not None:
            self.provider.keep(given["model"])

    # as TrainerCallback
    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Learn of the trainer's model."""
        self.context.update(args, given)

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
        ids = completion_tokens(completion_ids, len(prompts))
        context = self.context.from_call(given)
        prompt_ids = given_prompt_tokens(given, len(prompts))
        sizes = group_sizes(prompts if prompt_ids is None else prompt_ids)
        if self._looks_at_groups:
            context.check_whole_groups(sizes)
        scores = self._from_sampler(given, ids, sizes)
        if scores is None:
            firsts = [group[0] for group in cut(range(len(prompts)), sizes)]
            if prompt_ids is None:
                context.check_no_environments()
                template = context.template if self.template is None else self.template
                tokenizer = self.tokenizer or context.tokenizer
                heads = prompt_tokens([prompts[i] for i in firsts], tokenizer, template)
            else:
                heads = [prompt_ids[i] for i in firsts]
            policy, reference = context.model, context.ref_model
            with self.provider.scorer(policy, reference, context.step) as scorer:
                scores = scorer.score(heads, cut(ids, sizes), stats=stats_needed(self.reward))
        return self._rewards(scores, completions, ids, given.get("log_metric"))

    @cached_property
    def _looks_at_groups(self) -> bool:
        """Whether a completion's reward depends on the others of its prompt."""
        return self.normalize or "answers" in options_needed(self.reward)

    def _from_sampler(
        self, given: Mapping[str, Any], ids: list[list[int]], sizes: list[int]
    ) -> Scores | None:
        """Scores of the log-probs that the rollout kept, where they are all that is needed."""
        if self.provider.role != "policy" or not set(stats_needed(self.reward)) <= {"logprob"}:
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
        """The reward of each completion, logged."""
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
        """Mean, deviation within groups and the share without a reward, as they are: in nats."""
        if log_metric is None:
            return
        finite = reward[reward.isfinite()]
        name = f"self_reward/{self.reward}"
        if len(finite):
            log_metric(f"{name}/mean", finite.mean().item())
            log_metric(f"{name}/group_std", group_deviation(reward, scores.groups))
        log_metric(f"{name}/unscored", 1 - len(finite) / max(len(reward), 1))


class EnvironmentReward(TrainerCallback):
    """`SelfReward`, made of the environment when it is first needed."""

    __name__ = "self_reward"

    def __init__(self):
        self._made: SelfReward | None = None

    @property
    def reward(self) -> SelfReward:
        """What it stands for."""
        if self._made is None:
            self._made = reward_from(os.environ)
        return self._made

    # as TrainerCallback
    def on_init_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See `SelfReward`."""
        self.reward.on_init_end(args, state, control, **given)

    # as TrainerCallback
    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """See `SelfReward`."""
        self.reward.on_train_begin(args, state, control, **given)

    # as SelfReward
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **given: Any,
    ) -> list[float | None]:
        """See `SelfReward`."""
        return self.reward(prompts, completions, completion_ids, **given)


self_reward = EnvironmentReward()


def reward_from(environment: Mapping[str, str]) -> SelfReward:
    """The reward that the variables describe.

    Raises:
        InputError: If one of them is not as above, or has another name.
    """
    known = {"": "logprob", "_UNDER": "policy", "_NORMALIZE": "0", "_ANSWER": "", "_MAX_TOKENS": ""}
    names = {PREFIX + ending for ending in known}
    unknown = [name for name in environment if name.startswith(PREFIX) and name not in names]
    if unknown:
        raise InputError(f"variables must be of {', '.join(sorted(names))}, got {unknown[0]}.")
    reward, under, normalize, answer, max_tokens = (
        environment.get(PREFIX + ending, default) for ending, default in known.items()
    )
    if normalize not in ("0", "1"):
        raise InputError(f"{PREFIX}_NORMALIZE must be 0 or 1, got {normalize!r}.")
    if max_tokens and not max_tokens.isdecimal():
        raise InputError(f"{PREFIX}_MAX_TOKENS must be a number above 0, got {max_tokens!r}.")
    return SelfReward(
        reward,
        under=under,
        normalize=normalize == "1",
        answer=_imported(answer) if answer else None,
        max_tokens=int(max_tokens or 16384),
    )


# what it returns for a text is its own affair
def _imported(path: str) -> Callable[[str], Any]:
    """The function of a dotted path."""
    module, _, name = path.rpartition(".")
    try:
        found: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"{PREFIX}_ANSWER must be the dotted path of a function, got {path!r} ({error})."
        ) from error
    if not callable(found):
        raise InputError(f"{PREFIX}_ANSWER must name a function, got {path!r}, which is none.")
    return found


def _text(completion: Any) -> str:
    """The text of a completion, or of the last message of one that is messages."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    return content if isinstance(content, str) else ""


@dataclass
class TrainerContext:
    """What is known of a trainer, None where it is not.

    A callback is told the model, the tokenizer and the arguments: the way to be preferred. A reward
    named in a configuration file is no callback. TRL then still hands it `log_metric`, a method of
    the trainer, and the trainer is found by that.

    Attributes:
        model: What is trained.
        tokenizer: Its `processing_class`.
        args: Its arguments.
        trainer: Itself, where it can be asked.
        state: How far it is.
    """

    # a trainer's own attributes, whatever they hold
    model: Any = None
    tokenizer: Any = None
    args: Any = None
    trainer: Any = None
    state: Any = field(default=None, repr=False)

    # what callbacks are given
    def update(self, args: Any, given: Mapping[str, Any]) -> None:
        """Take over what a callback is told."""
        self.args = args
        self.model = given.get("model") or self.model
        self.tokenizer = given.get("processing_class") or self.tokenizer

    # what reward functions are given
    def from_call(self, given: Mapping[str, Any]) -> "TrainerContext":
        """This, with what a call of the reward function lets one find out."""
        trainer = getattr(given.get("log_metric"), "__self__", None)
        trainer = trainer if hasattr(trainer, "accelerator") else None
        return TrainerContext(
            model=self.model or getattr(trainer, "model", None),
            tokenizer=self.tokenizer or getattr(trainer, "processing_class", None),
            args=self.args or getattr(trainer, "args", None),
            trainer=trainer,
            state=given.get("trainer_state"),
        )

    @property
    def ref_model(self) -> Any:
        """The reference model, where the trainer can be asked and has one."""
        return getattr(self.trainer, "ref_model", None)

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return getattr(self.state, "global_step", 0) or 0

    @property
    def template(self) -> dict[str, Any]:
        """What TRL calls the chat template with, beside the messages."""
        found = dict(getattr(self.args, "chat_template_kwargs", None) or {})
        for name in ("chat_template", "tools"):
            value = getattr(self.trainer, name, None)
            if value:
                found[name] = value
        return found

    def check_no_environments(self) -> None:
        """Reject a trainer with environments, whose tools go into each prompt."""
        if getattr(self.trainer, "environments", None):
            raise InputError(
                "`prompts` of environments are rendered with tools of their own; let the rollout "
                "hand over `prompt_token_ids`."
            )

    def check_whole_groups(self, sizes: Sequence[int]) -> None:
        """Reject groups that are split between processes, where a reward looks at the group."""
        n = getattr(self.args, "num_generations", None)
        if getattr(self.args, "world_size", 1) > 1 and n and any(size % n for size in sizes):
            raise InputError(
                f"a reward of groups must see all {n} completions of a prompt in one process, got "
                f"{min(sizes)}; make `per_device_train_batch_size` a multiple of "
                "`num_generations`."
            )


class ScorerProvider:
    """Hands out the scorer of the model whose probabilities are the reward.

        policy       the live model, as it is at this step
        reference    what the trainer's KL term compares with: the adapter "ref", the model without
                     adapters, or the trainer's `ref_model`
        base         the policy before its first step: without adapters, or a frozen copy
        a model      of one's own, loaded or by path: frozen

    Args:
        under: A role, or a model of one's own: loaded, a path or a hub id.
        max_tokens: Of the scorer.
    """

    # a transformers or peft model, or a name
    def __init__(self, under: Any, max_tokens: int):
        self.role = under if isinstance(under, str) and under in ROLES else None
        self.max_tokens = max_tokens
        self._own: Any = None if self.role else under
        # a model, once there is one
        self._base: Any = None
        self._scorer: Scorer | None = None

    # the trainer's model
    def keep(self, policy: Any) -> None:
        """Remember the base, while the policy still is it."""
        if self.role == "base" and self._base is None and not _has_adapters(policy):
            self._base = _frozen_copy(policy)

    # models, and where training stands
    @contextmanager
    def scorer(self, policy: Any, reference: Any, step: int) -> Iterator[Scorer]:
        """The scorer, with the adapters that it needs.

        Args:
            policy: The trainer's model, None where no trainer is known.
            reference: Its reference model, None where it has none.
            step: Optimizer steps taken.

        Raises:
            InputError: If the model that was asked for is not there, or is sharded.
        """
        if self.role is None:
            yield self._of(self._own)
            return
        if policy is None:
            raise InputError(
                f"`under`={self.role!r} needs the trainer's model, got none; pass the reward as "
                "`callbacks=[reward]` too, or name a model by its path."
            )
        if self.role == "policy":
            yield self._of(policy)
        elif _has_adapters(policy):
            with _without_training(policy, reference_adapter=self.role == "reference"):
                yield self._of(policy)
        elif self.role == "reference":
            if reference is None:
                raise InputError(
                    "`under`='reference' needs a reference model, got a trainer without one; set "
                    "its `beta` above 0, or take 'base'."
                )
            yield self._of(reference)
        else:
            if self._base is None and step > 0:
                raise InputError(
                    f"`under`='base' must be kept before the first step, got step {step}; pass the "
                    "reward as `callbacks=[reward]` too, or name the base by its path."
                )
            self.keep(policy)
            base: Any = self._base
            yield self._of(base.to(policy.device))

    def _of(self, model: Any) -> Scorer:
        """The scorer of a model, made once for each."""
        if not isinstance(model, (str, Path)):
            model = _unwrapped(model)
            _check_whole(model)
        if self._scorer is None or (self._scorer.model is not model and model is not self._own):
            self._scorer = Scorer(model, max_tokens=self.max_tokens)
            with bare_forward(self._scorer.model):
                # found now, and kept
                _ = self._scorer.route
        return self._scorer


def _has_adapters(model: Any) -> bool:
    """Whether it is a peft model."""
    return hasattr(_unwrapped(model), "peft_config")


def _without_training(model: Any, *, reference_adapter: bool):
    """The policy as it was: its reference adapter, or no adapter."""
    model = _unwrapped(model)
    if reference_adapter and "ref" in model.peft_config:
        return _under_adapter(model, "ref")
    return model.disable_adapter()


@contextmanager
def _under_adapter(model: Any, name: str) -> Iterator[None]:
    """While open, the adapter `name` is the active one."""
    active = model.active_adapter
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)


def _unwrapped(model: Any) -> Any:
    """The model inside DDP."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _frozen_copy(model: Any) -> Any:
    """The model as it is now."""
    # a trainer may have replaced forwards by closures over the model itself
    found = copy.deepcopy(_unwrapped(model))
    for part in found.modules():
        for name in ("forward", "_original_forward"):
            vars(part).pop(name, None)
    return found.requires_grad_(False).eval()


def _check_whole(model: nn.Module) -> None:
    """Reject a model that this process holds in parts."""
    if any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters()):
        raise InputError(
            "`under` must be a model whose parameters are whole in this process, got a sharded "
            "one (FSDP, DeepSpeed ZeRO-3); name a model by its path, or serve the scorer."
        )
