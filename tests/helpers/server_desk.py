"""A desk of the model that ships, and a scorer behind it, without HTTP."""

import functools

from sharpen.models import ModelLimits, load_model, load_tokenizer
from sharpen.scoring import Scorer
from sharpen.server.batcher import split
from sharpen.server.state import ServerLimits, ServerState
from sharpen.server.text import Texts

PROMPT = "Numbers: 4 4 6 8 Target: 24\n"
RIGHT = "8 + 4 = 12 left: 4 6 12\n6 - 4 = 2 left: 2 12\n12 * 2 = 24"
WRONG = "8 * 4 = 32 left: 4 6 32\n32 - 6 = 26 left: 4 26\n26 - 4 = 22"


@functools.cache
def scorer() -> Scorer:
    return Scorer(load_model("game24", device="cpu"), tokenizer=load_tokenizer("game24"))


def desk(**limits) -> ServerState:
    texts = Texts(scorer().tokenizer)
    return ServerState("game24", ModelLimits.of(scorer().model), ServerLimits(**limits), texts)


def answered(asked):
    """What the request is answered, from one call of the scorer."""
    jobs = asked.jobs
    if not jobs:
        return asked.answer([])
    stats = sorted({name for job in jobs for name in job.stats})
    prompts, completions = [job.prompt for job in jobs], [job.completions for job in jobs]
    return asked.answer(split(scorer().score(prompts, completions, stats=stats), jobs))
