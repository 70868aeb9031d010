"""Models by name, and what token ids they accept.

ModelLimits      the bounds that a bad input breaks, checked in one place
load_model       a causal language model by name, path or hub id; load_tokenizer is its tokenizer

"game24" names the model that ships with the package; anything else is a folder on this machine or
a hub id. Weights come from safetensors and no code from the repository is run, unless asked for.
transformers is imported when a model is loaded, not before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError

if TYPE_CHECKING:
    import transformers

# where configurations keep the length of the context; GPT-2's `n_positions` answers to the first
LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")

SHIPPED = {"game24": Path(__file__).parent / "tasks" / "game24" / "base_model"}

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelLimits:
    """What a model accepts.

    Attributes:
        vocab_size: Rows of the input embedding; ids are 0 ... vocab_size - 1.
        max_length: Tokens of prompt and completion together; None if the model has no limit.
    """

    vocab_size: int
    max_length: int | None

    @classmethod
    def of(cls, model: "transformers.PreTrainedModel") -> "ModelLimits":
        """The limits of `model`, from its input embedding and its configuration."""
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        config = model.config.get_text_config()
        lengths = (getattr(config, field, None) for field in LENGTH_FIELDS)
        # some unlimited models say -1
        length = next((n for n in lengths if isinstance(n, int) and n > 0), None)
        return cls(vocab_size=weight.shape[0], max_length=length)

    def check(
        self,
        name: str,
        prompt_ids: Sequence[object],
        completion_ids: Sequence[object] = (),
        *,
        unread: int = 0,
    ) -> None:
        """Reject a prompt and completion that the model cannot read.

        Args:
            name: What the message begins with: "prompts[3]", or "samples.jsonl:12".
            prompt_ids: Token ids of the prompt.
            completion_ids: Token ids of the completion; may be empty.
            unread: How many of them, at the end, are predicted and never read: they need no place
                in the context.

        Raises:
            InputError: If the prompt is empty, an id is not an integer of the vocabulary, or both
                together are longer than the context.
        """
        if len(prompt_ids) == 0:
            raise InputError(
                f"{name}: the prompt must hold at least one token, got none; "
                "begin it with the tokenizer's BOS or EOS token."
            )
        self._check_ids(name, "prompt", prompt_ids)
        self.check_completion(name, len(prompt_ids), completion_ids, unread=unread)

    def check_completion(
        self, name: str, n_prompt: int, completion_ids: Sequence[object], *, unread: int = 0
    ) -> None:
        """`check` of a completion whose prompt, of `n_prompt` tokens, was checked before.

        Raises:
            InputError: As `check`.
        """
        self._check_ids(name, "completion", completion_ids)
        total = n_prompt + len(completion_ids)
        if self.max_length is not None and total - unread > self.max_length:
            raise InputError(
                f"{name}: prompt and completion must fit the model's context of "
                f"{self.max_length} tokens, got {n_prompt} + {len(completion_ids)} = "
                f"{total}; shorten one or leave the record out."
            )

    def _check_ids(self, name: str, part: str, ids: Sequence[object]) -> None:
        if all(map(_is_id, set(map(type, ids)))) and (not ids or self._holds(ids)):
            return
        for position, token in enumerate(ids):
            if not _is_id(type(token)):
                raise InputError(
                    f"{name}: token ids must be integers, got {token!r} at position {position} "
                    f"of the {part}; tokenise text first."
                )
            if not self._holds([token]):
                raise InputError(
                    f"{name}: token ids must be in [0, {self.vocab_size}), got {token} at "
                    f"position {position} of the {part}; use the tokenizer of this model."
                )

    # checked to be integers by then
    def _holds(self, ids: Sequence[Any]) -> bool:
        return min(ids) >= 0 and max(ids) < self.vocab_size


def _is_id(kind: type) -> bool:
    return issubclass(kind, Integral) and kind is not bool


def resolve_model(name: str | Path) -> str:
    """The path or hub id behind `name`.

    Raises:
        InputError: If `name` looks like a path (or is a folder name that does not exist as
            one) and there is no model there.
    """
    text = str(name)
    path = SHIPPED.get(text, Path(text).expanduser())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"`model` must be a folder with a config.json, got {text!r} without one; "
                "pass the folder that `save_pretrained` wrote."
            )
        return str(path)
    looks_like_path = path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1
    if looks_like_path or path.exists():
        raise InputError(
            f"`model` must be a model folder, a hub id or one of {', '.join(SHIPPED)}; "
            f"got {text!r}, where no such folder exists."
        )
    return text


def load_model(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> "transformers.PreTrainedModel":
    """A causal language model in eval mode.

    Args:
        name: "game24", a folder, or a hub id.
        device: Where to put it; default: the first GPU if there is one, else the CPU.
        dtype: Parameter dtype; default: that of the checkpoint on a GPU, fp32 on a CPU.
        trust_remote_code: Run model code that comes with the checkpoint.
        allow_pickle: Read pickled weights (which can run code) where no safetensors exist.

    Raises:
        InputError: If there is no such model, or it is not readable under these rules.
    """
    import transformers  # slow, and scoring a loaded model does without

    target = resolve_model(name)
    device = _device(device)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        dtype = DTYPES[dtype]
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            target,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(_why(name, error, "model")) from error
    return model.eval().to(device)  # type: ignore[arg-type] (decorated `to` hides its self)


def load_tokenizer(
    name: str | Path, *, trust_remote_code: bool = False
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer that belongs to `name`.

    Raises:
        InputError: If there is none.
    """
    import transformers

    target = resolve_model(name)
    auto = transformers.AutoTokenizer
    try:
        return auto.from_pretrained(target, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_why(name, error, "tokenizer")) from error


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        # a device that torch knows may still not be there
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"`device` must be one that this machine has, got {str(device)!r} ({reason})."
        ) from error
    return found


def _why(name: str | Path, error: Exception, part: str) -> str:
    first = " ".join(str(error).split())[:300]
    return (
        f"`model` {str(name)!r}: its {part} could not be loaded ({first}); check the name, the "
        "network or the folder, or pass `trust_remote_code` / `allow_pickle` if you trust it."
    )
