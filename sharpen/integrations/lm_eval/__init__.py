"""lm-evaluation-harness: the model type `sharpen`, `hf` with its log-likelihoods from the scorer.

    register()
    lm_eval.simple_evaluate(model="sharpen", model_args={"pretrained": "gpt2"}, tasks=["piqa"])

The harness does not look for model types in other packages, so something has to call `register`;
the command `sharpen lm-eval` does. Nothing of the harness is imported before.
"""

import importlib

from sharpen.errors import InputError

MODEL_TYPE = "sharpen"
TARGET = "sharpen.integrations.lm_eval.model:SharpenLM"


def register() -> None:
    """Make `sharpen` a model type of the harness; again changes nothing.

    Raises:
        InputError: If lm-eval, or what its `hf` model needs, is not installed.
    """
    try:
        # first: the harness lists its own model types only where none is registered yet
        importlib.import_module("lm_eval.models")
        importlib.import_module("lm_eval.models.huggingface")
        registry = importlib.import_module("lm_eval.api.registry").model_registry
    except ImportError as error:
        raise InputError(
            f"lm-evaluation-harness must be installed, got {error}; "
            'run `pip install "sharpen[lm-eval]"`.'
        ) from error
    if MODEL_TYPE not in registry:
        # a name, so that transformers is not imported before a model is asked for
        registry.register(MODEL_TYPE, target=TARGET)
