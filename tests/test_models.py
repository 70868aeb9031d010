import pytest
import torch

from helpers.tiny import tiny
from sharpen.errors import InputError
from sharpen.models import SHIPPED, load_model, load_tokenizer


def test_the_shipped_model_loads_as_any_other():
    model, tokenizer = load_model("game24", device="cpu"), load_tokenizer("game24")
    assert not model.training
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
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
