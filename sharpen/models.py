"""Load a causal language model and its tokenizer by name, path or hub id.

"game24" names the model that ships with the package; anything else is a folder on this
machine or a hub id. Weights come from safetensors and no code from the repository is run,
unless asked for.
"""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import InputError

SHIPPED = {"game24": Path(__file__).parent / "tasks" / "game24" / "base_model"}

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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
) -> PreTrainedModel:
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
    target = resolve_model(name)
    device = _device(device)
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
        dtype = DTYPES[dtype]
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(
            target,
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            use_safetensors=None if allow_pickle else True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(_why(name, error, "model")) from error
    return model.eval().to(device)  # type: ignore[arg-type] (decorated `to` hides its self)


def load_tokenizer(name: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `name`.

    Raises:
        InputError: If there is none.
    """
    target = resolve_model(name)
    try:
        return AutoTokenizer.from_pretrained(target, trust_remote_code=trust_remote_code)
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
