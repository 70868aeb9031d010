"""Models by name, and what token ids they accept.

ModelLimits      the bounds that a bad input breaks, checked in one place
load_model       a causal language model by name, path or hub id; load_tokenizer is its tokenizer

"game24" names the model that ships with the package; anything else is a folder on this machine or
a hub id. Weights come from safetensors and no code from the repository is run, unless asked for.
transformers is imported when a model is loaded, not before.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import InputError, require

if TYPE_CHECKING:
    import transformers

logger = logging.getLogger(__name__)

# where configurations keep the length of the context; GPT-2's `n_positions` answers to the first
LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len")

# rotary positions that one factor stretches, alike for short and long sequences
STRETCHED = ("linear", "yarn", "llama3")

SHIPPED = {"game24": Path(__file__).parent / "tasks" / "game24" / "base_model"}

# an adapter's folder has this beside its weights, and names the base model in it
ADAPTER = "adapter_config.json"
NO_PEFT = "`model` is the folder of an adapter, which needs peft ({error}); `pip install peft`."
# what a file begins with that Git LFS has not fetched
POINTER = b"version https://git-lfs"
# what wrappers put before the name of every weight
WRAPPERS = ("_orig_mod.", "module.")
# buffers that old versions of transformers saved, and that newer ones compute
OLD_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attention.bias", "masked_bias")

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
        if length is not None:
            length = max(length, *_stretched(config, length))
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


def _stretched(config: Any, length: int) -> list[int]:
    """How long a context its rotary positions are stretched to, for each kind of layer.

    A configuration may keep the length that the model was trained with: Qwen2.5's with YaRN does.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]
    found = [0]
    for kind in kinds:
        if kind.get("rope_type", kind.get("type")) in STRETCHED:
            trained = kind.get("original_max_position_embeddings") or length
            found.append(int(trained * kind.get("factor", 1)))
    return found


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
        _check_files(path)
        if (path / ADAPTER).is_file():
            require("peft", NO_PEFT)
        elif not (path / "config.json").is_file():
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


def _check_files(folder: Path) -> None:
    """Reject a folder whose large files did not arrive."""
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".json", ".model") or not path.is_file():
            continue
        with open(path, "rb") as file:
            start = file.read(len(POINTER))
        if start == POINTER or not start:
            got = "a pointer of Git LFS" if start else "an empty file"
            raise InputError(
                f"`model` {str(folder)!r}: {path.name} must hold what its name says, got {got}; "
                "fetch it with `git lfs pull`, or copy it again."
            )


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
    auto: Any = transformers.AutoModelForCausalLM
    load = partial(
        auto.from_pretrained,
        target,
        dtype=dtype or "auto",
        trust_remote_code=trust_remote_code,
        use_safetensors=None if allow_pickle else True,
        output_loading_info=True,
        # told with all others below
        ignore_mismatched_sizes=True,
    )
    try:
        with _quiet_library():
            model, info = load()
            for prefix in WRAPPERS:
                if info["missing_keys"] and _all_begin(info["unexpected_keys"], prefix):
                    model, info = load(key_mapping={"^" + re.escape(prefix): ""})
    # a loader may fail in any way at a file that it was not made for
    except Exception as error:
        raise InputError(_why(name, error, "model")) from error
    check_weights(str(name), model, info)
    return model.eval().to(device)  # type: ignore[arg-type] (decorated `to` hides its self)


def check_weights(name: str, model: nn.Module, info: Mapping[str, Any]) -> None:
    """Reject a checkpoint whose weights are not those of its model, which would score at random.

    Weights that no module would take, such as a classifier's head or a reward model's value head,
    are named in the log. One that belongs inside a module which the model has, or into one layer
    more than it has, is an error: the model was trained with it.

    Args:
        name: Of the checkpoint, for the message.
        model: That was loaded.
        info: What transformers says of the loading: `missing_keys`, `unexpected_keys` and
            `mismatched_keys`, of (name, size in the file, size in the model).

    Raises:
        InputError: If a weight is missing, has another size, or is lost.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"`model` {name!r}: its files must hold every weight of {type(model).__name__}, got no "
            f"{_some(missing)}; such weights would be random. Save the whole model with "
            "`save_pretrained`."
        )
    sizes = [f"{key} of {tuple(a)} for {tuple(b)}" for key, a, b in info["mismatched_keys"]]
    if sizes:
        raise InputError(
            f"`model` {name!r}: its weights must have the sizes that its config.json says, got "
            f"{_some(sorted(sizes))}; save the model again with its configuration."
        )
    owners = {_anonymous(path) for path, _ in model.named_modules() if _anonymous(path) != path}
    extra = sorted(info["unexpected_keys"])
    lost = [key for key in extra if _anonymous(key.rsplit(".", 2)[0]) in owners]
    lost = [key for key in lost if not key.endswith(OLD_BUFFERS)]
    if lost:
        raise InputError(
            f"`model` {name!r}: {type(model).__name__} must have a place for each weight of its "
            f"layers, got {_some(lost)}; correct its config.json, or give the library that its "
            "quantisation needs."
        )
    if extra:
        logger.warning("`model` %r: weights that it does not use: %s.", name, _some(extra))


def _anonymous(path: str) -> str:
    """A path with the numbers of its layers taken out."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", path)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more


def _all_begin(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep the library's table of weights off the screen; what is wrong is told in one line."""
    theirs = logging.getLogger("transformers")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


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
    # as above
    except Exception as error:
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
