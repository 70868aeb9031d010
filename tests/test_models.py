import json
import logging
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification, LlamaModel

from helpers.tiny import tiny
from sharpen.errors import InputError
from sharpen.models import SHIPPED, ModelLimits, load_model, load_tokenizer


def test_the_shipped_model_loads_as_any_other():
    model, tokenizer = load_model("game24", device="cpu"), load_tokenizer("game24")
    assert not model.training
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert next(model.get_input_embeddings().parameters()).shape[0] == len(tokenizer)
    text = "Numbers: 1 2 3 4 Target: 24\n4 * 3 = 12 left: 1 2 12"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_shipped_model_is_small():
    size = sum(path.stat().st_size for path in SHIPPED["game24"].iterdir())
    assert size <= 8 * 2**20


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused_without_asking_a_hub(name):
    with pytest.raises(InputError, match=r"got '.*', where no such folder exists"):
        load_model(name)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=r"must be a folder with a config.json"):
        load_model(tmp_path)
    tiny().config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its model could not be loaded"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="its tokenizer could not be loaded"):
        load_tokenizer(tmp_path)


def test_pickled_weights_are_read_only_when_asked_for(tmp_path):
    model = tiny()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="allow_pickle"):
        load_model(tmp_path, device="cpu")
    loaded = load_model(tmp_path, device="cpu", allow_pickle=True)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("device", ["cuda:99", "abacus"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(InputError, match="`device` must be one that this machine has, got"):
        load_model("game24", device=device)


def test_dtype_by_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(InputError, match="`dtype` must be one of float32, bfloat16, float16"):
        load_model(tmp_path, device="cpu", dtype="int8")


IDS = torch.tensor([[5, 6, 7, 8]])


def saved(folder, model, change=lambda weights: weights):
    """The folder of a model whose weights `change` has changed."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})
    return folder


def without(name):
    return lambda weights: {key: x for key, x in weights.items() if key != name}


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_checkpoint_that_lacks_a_weight_is_refused_and_it_is_named(tmp_path, name):
    folder = saved(tmp_path, tiny("llama"), without(name))
    with pytest.raises(InputError, match=f"got no `{name}`; such weights would be random"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, LlamaModel])
def test_a_checkpoint_without_a_language_models_head_is_refused(tmp_path, kind):
    kind(tiny("llama").config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"got no `lm_head\.weight`"):
        load_model(tmp_path, device="cpu")


def test_a_tied_head_is_no_lack(tmp_path):
    model = tiny("gpt2-tied")
    folder = saved(tmp_path, model)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert torch.equal(load_model(folder, device="cpu")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_that_a_wrapper_has_changed_are_read(tmp_path, prefix):
    model = tiny("llama")
    folder = saved(tmp_path, model, lambda ws: {prefix + key: x for key, x in ws.items()})
    assert torch.equal(load_model(folder, device="cpu")(IDS).logits, model(IDS).logits)


def test_every_weight_of_another_size_is_named(tmp_path):
    V, D = tiny("llama").lm_head.weight.shape
    folder = saved(
        tmp_path, tiny("llama"), lambda ws: ws | {"lm_head.weight": torch.zeros(V + 3, D)}
    )
    sizes = rf"`lm_head.weight of \({V + 3}, {D}\) for \({V}, {D}\)`"
    with pytest.raises(InputError, match=sizes):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "name", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_norm.weight"]
)
def test_a_weight_that_a_layer_was_trained_with_must_not_be_lost(tmp_path, name):
    folder = saved(tmp_path, tiny("llama"), lambda ws: ws | {name: torch.ones(32)})
    with pytest.raises(InputError, match=rf"got `{name}`; correct its config.json"):
        load_model(folder, device="cpu")


def test_weights_beside_the_model_are_said_and_harmless(tmp_path, caplog):
    model = tiny("llama")
    beside = {
        "score.weight": torch.ones(2, 32),
        "v_head.summary.weight": torch.ones(1, 32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    folder = saved(tmp_path, model, lambda ws: ws | beside)
    with caplog.at_level(logging.WARNING):
        loaded = load_model(folder, device="cpu")
    assert "does not use: `score.weight`, `v_head.summary.weight`." in caplog.text
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4096\n"


@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(("content", "got"), [(POINTER, "a pointer of Git LFS"), (b"", "an empty")])
def test_files_that_did_not_arrive_are_named(tmp_path, part, content, got):
    folder = saved(tmp_path, tiny("llama"))
    (folder / part).write_bytes(content)
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match=rf"{part} must hold what its name says, got {got}"):
            load(folder)


def test_half_a_file_is_one_line(tmp_path):
    folder = saved(tmp_path, tiny("llama"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="its model could not be loaded") as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_an_unknown_tokenizer_is_one_line(tmp_path):
    saved(tmp_path, tiny("llama"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "New"}}))
    with pytest.raises(InputError, match="its tokenizer could not be loaded"):
        load_tokenizer(tmp_path)


# peft 0.21 asks transformers by an old name
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter, beside that of its base, and the model that it makes."""
    base = tiny("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = LoraConfig(
        r=4, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", adapted


@PEFT_WARNS
def test_the_folder_of_an_adapter_is_its_base_with_it(adapter):
    folder, adapted = adapter
    loaded = load_model(folder, device="cpu")
    assert torch.allclose(loaded(IDS).logits, adapted(IDS).logits, atol=1e-5)
    base = load_model(folder.parent / "base", device="cpu")
    assert not torch.allclose(loaded(IDS).logits, base(IDS).logits, atol=1e-2)


@PEFT_WARNS
def test_the_folder_of_an_adapter_needs_peft(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="is the folder of an adapter, which needs peft"):
        load_model(adapter[0])


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "linear", "factor": 2.5}, 160),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
    ],
)
def test_a_context_is_as_long_as_its_positions_are_stretched(rope, length):
    model = tiny("llama")
    model.config.max_position_embeddings = 64
    model.config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert ModelLimits.of(model).max_length == length
    # one entry for each kind of layer
    model.config.rope_parameters = {"full_attention": rope, "sliding": {"rope_type": "default"}}
    assert ModelLimits.of(model).max_length == length
