"""Steps without dropout, whatever a family calls it and wherever it keeps its rate."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.tiny import CONTEXT, V, tiny
from helpers.tiny_groups import compared, fitted, losses
from sharpen.training.fit import dropout_disabled
from sharpen.training.losses import Dpo

COMMON = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# rates in layers, in numbers of a module, in the configuration that a forward reads
NOISY = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.5, "resid_pdrop": 0.5},
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.5},
    "falcon": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "attn_pdrop": 0.5},
    "starcoder2": {"num_key_value_heads": 2, "intermediate_size": 48, "residual_dropout": 0.5},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48, "dropout": 0.5, "layerdrop": 0.5},
    "mixtral": {
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_local_experts": 4,
        "router_jitter_noise": 0.5,
    },
}
IDS = torch.arange(3, 40)[None]


def noisy(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **COMMON | NOISY[name])
    return AutoModelForCausalLM.from_config(config).train()


@pytest.mark.parametrize("name", NOISY)
def test_no_rate_is_left_and_each_comes_back(name):
    model = noisy(name)

    def twice():
        with torch.no_grad():
            return model(IDS).logits, model(IDS).logits

    one, other = twice()
    assert not torch.equal(one, other), "nothing to turn off: the test proves nothing"
    before = model.config.to_dict()
    with dropout_disabled(model):
        one, other = twice()
        assert torch.equal(one, other)
    one, other = twice()
    assert not torch.equal(one, other)
    assert model.config.to_dict() == before


def test_rates_come_back_after_an_error():
    model = noisy("falcon")
    with pytest.raises(KeyError), dropout_disabled(model):
        raise KeyError
    assert model.config.hidden_dropout == 0.5


def test_a_run_is_that_of_a_model_without_dropout_and_saves_its_rates(tmp_path):
    groups = compared()

    def first_losses(name, **rates):
        out = tmp_path / name
        model = tiny("gpt2-tied", n_positions=CONTEXT, **rates)
        fitted(out, groups, Dpo(1.0), model=model, epochs=1.0)
        return losses(out)

    on = first_losses("on", attn_pdrop=0.5, resid_pdrop=0.5)
    assert on == first_losses("off", attn_pdrop=0.0, resid_pdrop=0.0)
    saved = AutoConfig.from_pretrained(tmp_path / "on" / "model")
    assert saved.resid_pdrop == 0.5
