"""Whose probabilities a reward is made of: live, frozen, without adapters, or a copy."""

import copy
import types
from types import SimpleNamespace

import peft
import pytest
import torch

from helpers.tiny import ragged, tiny
from sharpen.errors import InputError
from sharpen.integrations.trl.rewards import ScorerProvider

# of transformers, about what peft asks of it
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def logprobs(scorer):
    return scorer.score(*ragged()).reward("logprob")


def seen(judge, policy, reference=None, step=0):
    with judge.scorer(policy, reference, step) as scorer:
        return logprobs(scorer)


def moved(model, by=0.05):
    """The model after training: every parameter is another."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))
    return model


def true(model):
    from sharpen.scoring import Scorer

    return logprobs(Scorer(copy.deepcopy(model)))


def test_the_policy_is_live():
    model, judge = tiny(), ScorerProvider("policy", 1000)
    first = seen(judge, model)
    torch.testing.assert_close(first, true(model))
    moved(model)
    torch.testing.assert_close(seen(judge, model), true(model))
    assert not torch.allclose(seen(judge, model), first)


def test_the_base_stays_as_it_was_kept():
    model, judge = tiny(), ScorerProvider("base", 1000)
    before = true(model)
    judge.keep(model)
    moved(model)
    torch.testing.assert_close(seen(judge, model, step=7), before)


def test_the_base_is_kept_at_the_first_call_and_its_forward_is_its_own():
    model, judge = tiny(), ScorerProvider("base", 1000)
    # as TRL and accelerate do: a forward that closes over the model that it was made for
    own = model.forward
    model.forward = types.MethodType(lambda self, *a, **kw: own(*a, **kw), model)
    before = seen(judge, model)
    moved(model)
    torch.testing.assert_close(seen(judge, model, step=7), before)
    with judge.scorer(model, None, 7) as scorer:
        ids = torch.tensor([[3, 4, 5]])
        assert not torch.allclose(scorer.model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_base_that_comes_too_late_is_refused():
    with pytest.raises(InputError, match="before the first step, got step 3"):
        seen(ScorerProvider("base", 1000), tiny(), step=3)


def test_the_reference_is_the_trainers():
    model, reference = tiny(), tiny(seed=1)
    torch.testing.assert_close(
        seen(ScorerProvider("reference", 1000), model, reference), true(reference)
    )
    with pytest.raises(InputError, match="a trainer without one; set its `beta` above 0"):
        seen(ScorerProvider("reference", 1000), model)


def lora(model, name="default"):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config, adapter_name=name)


@pytest.mark.parametrize("role", ["base", "reference"])
def test_of_a_lora_policy_both_are_the_model_without_adapters(role):
    plain = tiny()
    before = true(plain)
    policy, judge = lora(plain), ScorerProvider(role, 1000)
    judge.keep(policy)
    torch.testing.assert_close(seen(judge, policy, step=5), before)
    # and the adapters are back
    assert not torch.allclose(seen(ScorerProvider("policy", 1000), policy), before)


def test_an_adapter_called_ref_is_the_reference_and_not_the_base():
    policy = lora(tiny())
    policy.add_adapter(
        "ref", peft.LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False)
    )
    base, reference = (seen(ScorerProvider(role, 1000), policy) for role in ("base", "reference"))
    assert not torch.allclose(base, reference)
    assert policy.active_adapter == "default"
    policy.set_adapter("ref")
    torch.testing.assert_close(reference, seen(ScorerProvider("policy", 1000), policy))


def test_without_a_trainer_a_role_means_nothing():
    for role in ("policy", "reference", "base"):
        with pytest.raises(InputError, match=f"`under`='{role}' needs the trainer's model"):
            seen(ScorerProvider(role, 1000), None)


def test_sharded_parameters_are_refused():
    model = tiny()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(InputError, match="whole in this process"):
        seen(ScorerProvider("policy", 1000), model)


def test_a_policy_that_is_replaced_is_scored_anew():
    judge = ScorerProvider("policy", 1000)
    seen(judge, tiny())
    torch.testing.assert_close(seen(judge, tiny(seed=2)), true(tiny(seed=2)))


def test_a_state_without_steps_is_at_its_beginning():
    from sharpen.integrations.trl.rewards import TrainerContext

    assert TrainerContext().from_call({"trainer_state": SimpleNamespace(global_step=4)}).step == 4
    assert TrainerContext().from_call({}).step == 0
