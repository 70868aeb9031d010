"""The law that samples were drawn from, and the trainings that need it to be the base's own.

Samples of a file are described by the settings that lie beside it (`runs.py`): FILE.run.json of
`sharpen sample`, run.json of the run directory of another command. Where there are none, the rows
themselves tell a power sampler. The log-probs of a file are raw, whatever the law: those of the
model at temperature 1 (`Samples`).
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sharpen.errors import InputError
from sharpen.records import Row, read_rows
from sharpen.runs import Settings
from sharpen.sampling.metropolis import Metropolis
from sharpen.sampling.smc import ParticleFilter

from .sources import model_settings
from .stages import settings_beside

if TYPE_CHECKING:
    from .once import OnceConfig

log = logging.getLogger("sharpen")

# what only a power sampler writes into a row
TOLD_BY = {"accepted": "mh", "log_z": "smc"}
# of the draws of a run directory
POOL, RUN = "samples.jsonl", "run.json"


@dataclass(frozen=True)
class Law:
    """A law of completions.

    Attributes:
        model: Name or folder; None where it is not known.
        endpoint: Where a server drew; its model's name and the base's need not agree.
        sampler: "model", or "mh" or "smc" of the power distribution.
        alpha: The power; None where it is not known.
        temperature: Of each token; 0 is greedy.
        top_p: Mass of the nucleus.
    """

    model: str | None = None
    endpoint: str | None = None
    sampler: str = "model"
    alpha: float | None = 1.0
    temperature: float = 1.0
    top_p: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether it is a model's own."""
        return (self.alpha, self.temperature, self.top_p) == (1.0, 1.0, 1.0)

    def __str__(self) -> str:
        """In words."""
        power = "" if self.alpha is None else f" alpha {self.alpha:g}"
        parts = [f"`--sampler {self.sampler}`{power}"] if self.sampler != "model" else []
        for name, value in (("temperature", self.temperature), ("top_p", self.top_p)):
            parts += [f"{name} {value:g}"] if value != 1 else []
        return "draws of " + (self.model or "a model") + "".join(f", {part}" for part in parts)


def law_of(settings: Settings | None, row: Row | None = None) -> Law | None:
    """The law of a file of samples; None where nobody says.

    Args:
        settings: Those beside the file.
        row: One of its rows.

    Example:
        >>> print(law_of({"model": "game24", "temperature": 0.5, "top_p": 1.0}))
        draws of game24, temperature 0.5
        >>> print(law_of({"model": "game24", "temperature": 1.0, "top_p": 1.0, "sampler": "mh"}))
        draws of game24, `--sampler mh` alpha 4
        >>> law_of(None, {"log_z": -2.5}).is_plain
        False
    """
    told = next((TOLD_BY[name] for name in TOLD_BY if name in (row or {})), None)
    # settings of what did not draw, such as `sharpen score`, say nothing of the law
    if settings is None or "temperature" not in settings:
        return None if told is None else Law(sampler=told, alpha=None)
    sampler = settings.get("sampler", "model")
    alpha = {"mh": Metropolis.alpha, "smc": ParticleFilter.alpha}.get(sampler, 1.0)
    # `xpo` has an alpha too: its optimism
    given = settings.get("alpha") if sampler in TOLD_BY.values() else None
    endpoint = settings.get("endpoint")
    return Law(
        model=settings.get("model") if endpoint is None else settings.get("endpoint_model"),
        endpoint=endpoint,
        sampler=sampler,
        alpha=alpha if given is None else given,
        temperature=settings["temperature"],
        top_p=settings.get("top_p", 1.0),
    )


def read_law(path: str) -> Law | None:
    """The law of the samples in a file.

    Raises:
        InputError: If the settings beside it cannot be read.
    """
    place = Path(path)
    if not place.is_file():
        return None
    rows = read_rows(path)
    return law_of(_settings(place), next((row for _, row in rows), None))


def check_law(config: "OnceConfig", plain: Literal["must", "should", "any"], by: str) -> None:
    """Refuse samples of another law than a training is made for, or warn of them.

    Samples that the command is to draw itself are looked at as well as given ones. A file of which
    nothing is known is taken at its word.

    Args:
        config: Of the command.
        plain: Whether the optimum is the stated one on plain draws of the base alone ("must"),
            whether the paper's loss has it so ("should"), or whether any samples will do.
        by: What has that optimum, as it is typed.

    Raises:
        InputError: If the law must be plain and is not, or if `--scores sampler` would take
            another model's log-probs for the base's.
    """
    base = model_settings(config, "")["model"]
    given = config.samples is not None
    drawn = Law(base, temperature=config.temperature, top_p=config.top_p)
    law = read_law(config.samples) if config.samples is not None else drawn
    if law is None:
        return
    is_other = law.endpoint is None and law.model is not None and law.model != base
    if given and config.scores == "sampler":
        _check_scores(law, base, is_other=is_other)
    if plain == "any" or (law.is_plain and not is_other):
        return
    where = f"`samples` {config.samples!r}" if given else "`temperature` and `top_p`"
    if plain == "must":
        raise InputError(
            f"{where} must make plain draws of {base} for {by}, whose optimum is another on other "
            f"samples, got {law}; use `--weights equal` or `best`, or draw with `--sampler model`, "
            "temperature 1 and top_p 1."
        )
    log.warning(
        "%s: %s takes pairs of plain draws of %s, got %s; its optimum is the same only where the "
        "model reaches it exactly.", where, by, base, law,
    )  # fmt: skip


# base: name or folder, as settings have it
def _check_scores(law: Law, base: Any, *, is_other: bool) -> None:
    if is_other:
        raise InputError(
            f"`scores` sampler must come with samples whose log-probs are those of {base}, got "
            f"{law}; use `--scores scorer`."
        )
    if law.endpoint is not None:
        log.warning(
            "log-probs by %s at %s are taken as those of %s; `--scores scorer` computes them.",
            law.model, law.endpoint, base,
        )  # fmt: skip


def _settings(path: Path) -> Settings | None:
    beside = [settings_beside(path)]
    if path.name == POOL:
        beside.append(path.with_name(RUN))
    found = next((place for place in beside if place.is_file()), None)
    if found is None:
        return None
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(found)!r} must hold the settings of its samples, got what is no JSON "
            f"({error}); mend or remove it."
        ) from error
    if not isinstance(settings, dict):
        raise InputError(
            f"{str(found)!r} must hold the settings of its samples, got "
            f"{type(settings).__name__}; mend or remove it."
        )
    return settings
