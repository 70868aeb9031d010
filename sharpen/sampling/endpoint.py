"""Sample from any OpenAI-compatible completions endpoint, with the log-prob of every token.

The route of models that are only served, such as GPT-3.5-turbo-instruct in Huang et al. 2024
(arXiv:2412.01951). One request asks for all completions of a prompt; a server that gives fewer is
asked again for the rest, under another seed. A sample's seed is made from the run's seed, the
prompt's id and the sample's index; whether the same seed gives the same sample is up to the server.

Log-probs are what the server says they are. vLLM's are raw (temperature 1) by default; OpenAI does
not document whether `temperature` and `top_p` change them, so they are sure at 1 alone.
"""

import itertools
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from sharpen.errors import InputError

from .draw import row_key
from .endpoint_choices import Choice, NoLogprobsError, PromptForm, read_choices, request
from .endpoint_client import EndpointClient, EndpointError
from .protocol import Prompt, Samples, SamplingConfig
from .side_by_side import side_by_side

logger = logging.getLogger(__name__)

ROUTE = "/completions"


@dataclass(frozen=True)
class EndpointSamples(Samples):
    """Samples of a server.

    Attributes:
        tokens: Text of each token, as the server writes it; what it has for every log-prob where
            it tells no ids. OpenAI writes no end-of-sequence token, and gives no log-prob of it.
        served_model: What the server calls the model that answered.
    """

    tokens: list[list[str]]
    served_model: str


class EndpointSampler:
    """The `Sampler` of a completions endpoint.

    Args:
        client: Where it is.
        model: Its name there.
        form: "text" sends text and takes text: any server. "ids" sends token ids and wants those
            of the completions back: vLLM's server.
        concurrency: Prompts asked for at a time.
        choices: Most completions asked for in one request.

    Raises:
        InputError: If a number is not positive, or the model has no name.
    """

    route = "endpoint"

    def __init__(
        self,
        client: EndpointClient,
        model: str,
        *,
        form: PromptForm = "text",
        concurrency: int = 8,
        choices: int = 128,
    ):
        for name, value in (("concurrency", concurrency), ("choices", choices)):
            if value < 1:
                raise InputError(f"`{name}` of an endpoint must be at least 1, got {value}.")
        if not model:
            raise InputError("`endpoint_model` must be given with `--endpoint`: its name there.")
        self.client = client
        self.model = model
        self.form: PromptForm = form
        self.concurrency = concurrency
        self.choices = choices
        self._logprobs = 0
        self._told: set[str] = set()

    def check(self, prompts: Sequence[Prompt], config: SamplingConfig) -> None:
        """Refuse prompts that cannot be sent.

        Raises:
            InputError: If ids are to be sent and a prompt has none.
        """
        if self.form == "ids":
            for prompt in prompts:
                if not prompt.ids:
                    raise InputError(
                        f"{prompt.place}: prompts must have token ids to be sent as ids; give "
                        "`--model` for its tokenizer, or `--endpoint-prompts text`."
                    )
        if config.temperature not in (0, 1) or config.top_p != 1:
            self._tell_once(
                "log-probs at a temperature or top-p other than 1 are what the server makes of "
                "them: vLLM's are raw, others may not say."
            )

    def sample(
        self, prompts: Sequence[Prompt], config: SamplingConfig, *, done: Collection[str] = ()
    ) -> Iterator[list[Samples]]:
        """See `Sampler`. Each prompt is yielded when it is whole, in any order.

        A refusal of one prompt is raised when the others are finished; one of the server itself
        as soon as what is under way is finished or given up.

        Raises:
            InputError: As `check` does.
            EndpointError: If any prompt was not answered.
        """
        self.check(prompts, config)
        refused: list[tuple[Prompt, Exception]] = []
        broken: list[Exception] = []
        todo = (prompt for prompt in prompts if prompt.id not in done)
        going = itertools.takewhile(lambda _: not broken, todo)
        for prompt, result in side_by_side(
            lambda prompt: self._draw(prompt, config), going, self.concurrency
        ):
            if not isinstance(result, Exception):
                yield [result]
            elif isinstance(result, EndpointError) and result.of_request:
                refused.append((prompt, result))
            else:
                broken.append(result)
        if broken:
            raise broken[0]
        if refused:
            prompt, first = refused[0]
            raise EndpointError(
                f"{len(refused)} of {len(prompts)} prompts were refused, first {prompt.place}: "
                f"{first} The others are kept.",
                of_request=True,
            )

    def _draw(self, prompt: Prompt, config: SamplingConfig) -> EndpointSamples:
        drawn: list[Choice] = []
        served = self.model
        while len(drawn) < config.n:
            wanted = min(config.n - len(drawn), self.choices)
            fresh, served = self._ask(prompt, config, config.first + len(drawn), wanted)
            if not fresh:
                url = self.client.url
                raise EndpointError(f"`endpoint` {url}: must give {wanted} completions, got none.")
            if len(fresh) < wanted:
                self._tell_once(
                    f"it gave {len(fresh)} completions where {wanted} were asked for; the rest is "
                    "asked for again, and every request pays for its prompt."
                )
            drawn += fresh[:wanted]
        ids = [choice.ids for choice in drawn if choice.ids is not None]
        return EndpointSamples(
            prompt_id=prompt.id,
            completions=[choice.text for choice in drawn],
            completion_ids=ids,
            logprobs=[choice.logprobs for choice in drawn],
            finish_reasons=[choice.finish_reason for choice in drawn],
            tokens=[choice.tokens for choice in drawn],
            served_model=served,
        )

    def _ask(
        self, prompt: Prompt, config: SamplingConfig, first: int, n: int
    ) -> tuple[list[Choice], str]:
        # as many bits as every server takes
        seed = row_key(config.seed, prompt.id, first) % (1 << 31)
        body = request(self.model, prompt, config, n=n, seed=seed, form=self.form)
        body["logprobs"] = self._logprobs
        answer = self.client.post(ROUTE, body)
        try:
            choices = read_choices(self.client.url, answer, self.form)
        except NoLogprobsError:
            if body["logprobs"] > 0:
                raise
            # some servers take 0 for "none"
            self._logprobs = 1
            return self._ask(prompt, config, first, n)
        return choices, str(answer.get("model", self.model))

    def _tell_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("endpoint %s: %s", self.client.url, what)
