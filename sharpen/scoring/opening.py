"""What a scorer is given, loaded where it is a path."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharpen.errors import InputError

if TYPE_CHECKING:
    import transformers


def opened(
    model: "transformers.PreTrainedModel | str | Path", loading: Mapping[str, Any]
) -> "transformers.PreTrainedModel":
    """The model, loaded from its path with the options of `load_model`.

    Raises:
        InputError: If it cannot be loaded, options come with a model that is loaded already, or it
            is an encoder-decoder.
    """
    if isinstance(model, (str, Path)):
        from sharpen.models import load_model

        model = load_model(model, **loading)
    else:
        given = [name for name, value in loading.items() if value]
        if given:
            raise InputError(
                f"`{given[0]}` applies to a path, got a loaded {type(model).__name__}; "
                "move or cast the model itself first."
            )
    if model.config.is_encoder_decoder:
        raise InputError(
            f"`model` must be a causal LM, got the encoder-decoder "
            f"{type(model).__name__}; only decoder-only models can be scored."
        )
    return model


def opened_tokenizer(
    tokenizer: "transformers.PreTrainedTokenizerBase | None", model: Any, trust_remote_code: bool
) -> "transformers.PreTrainedTokenizerBase":
    """The tokenizer that was given, or the one beside the model's path.

    Raises:
        InputError: If none was given with a model that is not a path, or none can be loaded.
    """
    if tokenizer is not None:
        return tokenizer
    if not isinstance(model, (str, Path)):
        raise InputError(
            "text needs a tokenizer, got none; pass `tokenizer=` to Scorer, or a path as model."
        )
    from sharpen.models import load_tokenizer

    return load_tokenizer(model, trust_remote_code=trust_remote_code)
