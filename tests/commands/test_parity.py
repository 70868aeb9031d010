"""`sharpen parity`: engines that agree, a token that was tampered with, what is refused."""

import json
import weakref

import pytest
import torch

from helpers.completions_server import serving
from sharpen.cli import main
from sharpen.commands import parity as parity_command
from sharpen.models import load_model

MODEL = ["--model", "game24", "--device", "cpu"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "s.jsonl"
    draw = ["--task", "game24", "--limit", "2", "-n", "3", "--max-new-tokens", "12"]
    assert main(["sample", *MODEL, *draw, "--out", str(path)]) == 0
    return path


def parity(samples, *flags):
    """Exit code."""
    try:
        return main(["parity", *MODEL, "--samples", str(samples), *flags])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("against", ["sampler", "hf"])
def test_engines_that_agree_are_within(samples, against, tmp_path, capsys):
    out = tmp_path / "parity.json"
    flags = ["--against", against, "--tolerance", "1e-4", "--out", str(out), "--worst", "2"]
    assert parity(samples, *flags) == 0
    text = capsys.readouterr().out
    assert f"sharpen (tree) - {against}: 72 tokens of 6 completions" in text
    assert "is within the tolerance 0.0001" in text
    report = json.loads(out.read_text())
    assert report["is_within"]
    assert report["differences"]["n_tokens"] == 72
    assert 0 < report["differences"]["max"] < 1e-4
    assert len(report["worst"]) == 2
    assert report["settings"]["model"] == "game24"


def tampered(samples, path, by=0.01):
    """The samples, the fifth log-prob of the second prompt's third completion off by `by`."""
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows[1]["logprobs"][2][4] -= by
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows[1]


def test_a_token_that_differs_is_found_in_its_place(samples, tmp_path, capsys):
    path, out = tmp_path / "t.jsonl", tmp_path / "parity.json"
    row = tampered(samples, path)
    assert parity(path, "--against", "sampler", "--worst", "1", "--out", str(out)) == 1
    text = capsys.readouterr().out
    assert f"{row['prompt_id']}, completion 2, token 4" in text
    assert "is ABOVE the tolerance 0.001" in text
    report = json.loads(out.read_text())
    (one,) = report["worst"]
    assert one["token_id"] == row["completion_ids"][2][4]
    assert one["difference"] == pytest.approx(0.01, abs=1e-4)
    # the mean is another measure
    assert parity(path, "--against", "sampler", "--measure", "mean") == 0
    # and the first record is not the second
    assert parity(path, "--against", "sampler", "--limit", "1", "--tolerance", "1e-4") == 0


def test_a_server_is_compared_by_what_it_echoes(samples, capsys):
    model = load_model("game24", device="cpu")

    def echo(body):
        ids = torch.tensor([body["prompt"]])
        with torch.no_grad():
            rows = model(ids).logits[0, :-1].log_softmax(1)
        values = [None, *rows.gather(1, ids[0, 1:, None])[:, 0].tolist()]
        return {"choices": [{"text": "", "logprobs": {"token_logprobs": values}}]}

    with serving() as (url, server):
        server.answer = echo
        flags = ["--against", "server", "--endpoint", url, "--endpoint-model", "tiny"]
        assert parity(samples, *flags, "--tolerance", "1e-4") == 0
        # a server at temperature 2 is another distribution
        server.answer = lambda body: halved(echo(body))
        assert parity(samples, *flags) == 1
    assert "sharpen (tree) - server: 72 tokens" in capsys.readouterr().out


def halved(answer):
    logprobs = answer["choices"][0]["logprobs"]
    logprobs["token_logprobs"] = [x and x / 2 for x in logprobs["token_logprobs"]]
    return answer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--against", "server"], "`--against server` and `--endpoint` must come together"),
        (["--against", "hf", "--endpoint", "http://localhost/v1"], "must come together"),
        (
            ["--against", "server", "--endpoint", "http://localhost/v1"],
            "`endpoint_model` must be given",
        ),
        (["--against", "hf", "--vllm", "a=1"], "`--vllm` must come with `--against vllm`"),
        (["--against", "vllm"], "vLLM is not installed here"),
        (["--against", "hf", "--tolerance", "-1"], "`tolerance` must be at least 0 and finite"),
        (["--against", "hf", "--clip", "0"], "`clip` must be positive"),
        (["--against", "hf", "--limit", "0"], "`limit` must be at least 1"),
        (["--against", "hf", "--out", "/no/such/folder/x"], "must be in a folder that exists"),
    ],
)
def test_bad_options_are_refused(samples, flags, message, capsys):
    assert parity(samples, *flags) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_files_are_neither_guessed_nor_written_over(samples, tmp_path, capsys):
    assert parity(tmp_path / "none", "--against", "hf") == 2
    assert "No such file" in capsys.readouterr().err
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "Numbers: 1", "completion": "1 + 1"}\n')
    assert parity(text, "--against", "sampler") == 2
    assert "must have the sampler's own `logprobs`" in capsys.readouterr().err
    path = tmp_path / "bad.jsonl"
    row = {"prompt": "Numbers: 1", "completions": ["1"], "logprobs": [["a", -1.0]]}
    path.write_text(json.dumps(row) + "\n")
    assert parity(path, "--against", "sampler") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "bad.jsonl:1: `logprobs`[0][0] must be a number or null, got 'a'" in told
    assert parity(samples, "--against", "sampler", "--out", str(samples)) == 2
    assert "exists; choose another" in capsys.readouterr().err


def test_our_model_is_gone_when_another_engine_starts(samples, monkeypatch, capsys):
    held, states = [], []
    own = parity_command.load

    def watched(config):
        model, tokenizer = own(config)
        held.append(weakref.ref(model))
        return model, tokenizer

    class Engine:
        """In vLLM's place; an engine takes its memory when it is made."""

        def __init__(self, model, **options):
            states.append([model() for model in held])

        def logprobs(self, prompts, completions):
            rows = [json.loads(line) for line in samples.read_text().splitlines()]
            assert [row["completion_ids"] for row in rows] == completions
            return [row["logprobs"] for row in rows]

        def close(self):
            states.append("closed")

    monkeypatch.setattr(parity_command, "load", watched)
    monkeypatch.setattr(parity_command, "load_vllm", lambda options, _: Engine(options.model))
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(len(states)))
    assert parity(samples, "--against", "vllm", "--tolerance", "1e-4") == 0
    assert states == [[None], "closed"]
    # before the engine was made
    assert emptied[:1] == [0]
    assert "sharpen (tree) - vllm: 72 tokens" in capsys.readouterr().out
