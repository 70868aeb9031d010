"""`sharpen parity` against `sharpen serve`, over loopback."""

import json

import pytest

from helpers.serving import serving
from sharpen.cli import main
from sharpen.models import resolve_model

DRAW = ["--task", "game24", "--split", "test", "--limit", "6", "-n", "4", "--max-new-tokens", "48"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "samples.jsonl"
    assert main(["sample", "--model", "game24", "--device", "cpu", *DRAW, "--out", str(path)]) == 0
    return path


def compared(samples, url, out, *flags):
    argv = ["parity", "--model", "game24", "--device", "cpu", "--samples", str(samples)]
    argv += ["--against", "server", "--endpoint", f"{url}/v1", "--endpoint-model", "game24"]
    code = main([*argv, "--out", str(out), *flags])
    return code, json.loads(out.read_text())


def test_a_server_of_the_same_weights_agrees_token_by_token(samples, tmp_path, capsys):
    with serving("game24") as server:
        code, report = compared(samples, server.url, tmp_path / "same.json", "--tolerance", "1e-4")
    n_tokens = sum(
        len(ids)
        for line in samples.read_text().splitlines()
        for ids in json.loads(line)["completion_ids"]
    )
    assert code == 0
    assert report["differences"]["n_tokens"] == n_tokens > 400
    assert 0 <= report["differences"]["max"] <= 1e-4
    assert "report:" in capsys.readouterr().out


def test_a_server_of_other_weights_is_found_out(samples, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = resolve_model("game24")
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.get_input_embeddings().weight[30] += 0.5
    folder = tmp_path / "other"
    other.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    with serving(folder, "--name", "game24") as server:
        with pytest.raises(SystemExit) as ended:
            compared(samples, server.url, tmp_path / "other.json")
        assert ended.value.code == 1
    report = json.loads((tmp_path / "other.json").read_text())
    assert report["differences"]["max"] > 0.01
    assert not report["is_within"]
    assert report["worst"]
