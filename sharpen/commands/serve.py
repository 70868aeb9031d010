"""`sharpen serve`: the scorer over HTTP, for evaluators, trainers and anything that speaks JSON."""

import logging
import sys

from transformers import PreTrainedTokenizerBase

from sharpen.errors import InputError, check_fields, require
from sharpen.models import ModelLimits, load_model, load_tokenizer
from sharpen.scoring import Scorer
from sharpen.scoring.rewards import check_reward
from sharpen.server.batcher import MicroBatcher
from sharpen.server.state import ServerLimits, ServerState
from sharpen.server.text import Texts
from sharpen.server.unscorable import UnscorableReward

from .options import ServeConfig

log = logging.getLogger("sharpen")

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "msgpack")
HOW = 'which cannot be imported ({error}); pip install "sharpen[serve]".'


def run(config: ServeConfig) -> None:
    """Serve until a signal."""
    # everything that can be wrong is reported before a model is loaded
    check(config)
    limits = ServerLimits(
        config.max_request_bytes, config.max_request_tokens, config.max_n, config.max_queue
    )
    for module in PACKAGES:
        require(module, f"`sharpen serve` needs {module}, {HOW}")
    from sharpen.server.app import Service, address_of, api_key, bound, serve
    from sharpen.server.metrics import Metrics

    key = api_key(config.host)
    with bound(config.host, config.port) as listener:
        model = load_model(
            config.model,
            device=config.device,
            dtype=None if config.dtype == "auto" else config.dtype,
            trust_remote_code=config.trust_remote_code,
            allow_pickle=config.allow_pickle,
        )
        tokenizer = _tokenizer(config)
        scorer = Scorer(model, tokenizer=tokenizer, max_tokens=config.max_tokens)
        log.info("scoring by %s", scorer.route)
        metrics = Metrics()
        batcher = MicroBatcher(
            scorer.score,
            max_tokens=config.max_tokens,
            max_queue=config.max_queue,
            wait_seconds=config.wait_ms / 1000,
            observe=metrics.batch,
        )
        accepts = ModelLimits.of(model)
        state = ServerState(
            config.name or config.model,
            accepts,
            limits,
            Texts(tokenizer, limits.max_chars(accepts.max_length), model.generation_config),
            config.reward,
            UnscorableReward(config.unscorable_reward, metrics.unscorable),
        )
        sys.stdout.write(f"sharpen: serving {state.name} at {address_of(listener)}\n")
        sys.stdout.flush()
        service = Service(state, batcher, metrics, key)
        serve(service, listener, drain_seconds=config.drain_seconds)


def check(config: ServeConfig) -> None:
    """Reject options that no server can have."""
    check_reward(config.reward, "which only `/score` can get", options=("keys",))
    rules = [
        ("max_tokens", config.max_tokens >= 1, "at least 1"),
        ("wait_ms", 0 <= config.wait_ms < float("inf"), "at least 0 and finite"),
        ("drain_seconds", 0 <= config.drain_seconds < float("inf"), "at least 0 and finite"),
    ]
    check_fields(config, rules)
    UnscorableReward(config.unscorable_reward)


def _tokenizer(config: ServeConfig) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    except InputError as error:
        log.warning("only token ids can be read: %s", error)
        return None
