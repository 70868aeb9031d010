import pytest
from transformers import BloomConfig, BloomForCausalLM

from helpers.tiny import CONTEXT, FAMILIES, V, tiny
from sharpen.errors import InputError
from sharpen.models import ModelLimits

LIMITS = ModelLimits(vocab_size=10, max_length=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_limits_are_read_from_the_model(family):
    assert ModelLimits.of(tiny(family)) == ModelLimits(vocab_size=V, max_length=CONTEXT)


def test_vocabulary_is_that_of_the_embedding_not_of_the_configuration():
    model = tiny()
    model.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data[:50]
    assert ModelLimits.of(model).vocab_size == 50


def test_a_model_may_have_no_longest_sequence():
    model = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2))
    limits = ModelLimits.of(model)
    assert limits == ModelLimits(vocab_size=20, max_length=None)
    limits.check("prompts[0]", [1] * 5000, [2])


def test_what_fits_passes():
    LIMITS.check("prompts[0]", [0])
    LIMITS.check("prompts[0]", [0, 9, 3], [9, 9, 9, 9, 0])


def test_what_is_never_read_needs_no_place():
    LIMITS.check("prompts[0]", [0, 9, 3], [9, 9, 9, 9, 9, 0], unread=1)
    with pytest.raises(InputError, match=r"context of 8 tokens, got 3 \+ 7 = 10"):
        LIMITS.check("prompts[0]", [0, 9, 3], [9] * 7, unread=1)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ([], [1], "prompts[3]: the prompt must hold at least one token, got none; begin it"),
        ([1, 10], [], "[0, 10), got 10 at position 1 of the prompt; use the tokenizer"),
        ([1], [2, 3, -1], "[0, 10), got -1 at position 2 of the completion; use the tokenizer"),
        ([1, 2.0], [], "must be integers, got 2.0 at position 1 of the prompt; tokenise"),
        ([True], [], "must be integers, got True at position 0 of the prompt; tokenise"),
        ("ab", [], "must be integers, got 'a' at position 0 of the prompt; tokenise"),
        ([1] * 5, [1] * 4, "context of 8 tokens, got 5 + 4 = 9; shorten one"),
    ],
)
def test_messages_say_name_wanted_got_and_fix(prompt, completion, message):
    with pytest.raises(InputError) as error:
        LIMITS.check("prompts[3]", prompt, completion)
    assert str(error.value).startswith("prompts[3]: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
