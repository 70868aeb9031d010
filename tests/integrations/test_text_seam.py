"""Text is read the same way everywhere: the right number is a plain forward on the right ids."""

import asyncio
import json

import pytest
import torch

from helpers.tiny import tiny
from helpers.tokenizers import EOS, PAD, bytes_of_text, llama
from sharpen import Scorer
from sharpen.cli import main
from sharpen.integrations import ms_swift, nemo_rl, reward_model
from sharpen.integrations.openrlhf import SelfReward
from sharpen.integrations.verl import compute_score
from sharpen.models import ModelLimits
from sharpen.server.batcher import split
from sharpen.server.routes import read_score
from sharpen.server.state import ServerLimits, ServerState
from sharpen.server.text import Texts

CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<turn>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [{"role": "user", "content": "2+2"}]


def saved(folder, tokenizer):
    model = tiny("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


def by_hand(model, prompt, completion):
    """log p(completion | prompt), in nats, by a plain forward."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        logp = model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logp.gather(1, ids[0, len(prompt) :, None]).sum().item()


def by_command(folder, tmp_path, record, *options):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(record) + "\n")
    argv = ["score", "--model", folder, "--device", "cpu", "--input", source, "--out", out]
    assert main([str(x) for x in (*argv, *options)]) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    return row["rewards"]["logprob"]


def by_server(scorer, body):
    texts = Texts(scorer.tokenizer, generation_config=scorer.model.generation_config)
    state = ServerState("tiny", ModelLimits.of(scorer.model), ServerLimits(), texts)
    asked = read_score(body, state)
    (job,) = asked.jobs
    found = scorer.score([job.prompt], [job.completions], stats=job.stats)
    answer = asked.answer(split(found, [job]))
    return float(next(iter(answer["rewards"]["logprob"])))


@pytest.mark.parametrize(("prompt", "completion"), [("Q\n", "8"), ("Q: 8", "8"), ("Q\n", " 8 + x")])
def test_a_completion_gets_no_space_that_is_not_there(tmp_path, prompt, completion):
    tokenizer = llama()
    model = saved(tmp_path / "model", tokenizer)
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + completion)
    assert whole[: len(before)] == before
    want = by_hand(model, before, whole[len(before) :])
    folder = str(tmp_path / "model")
    scorer = Scorer(folder, device="cpu")
    rating = reward_model.Rating(model=folder, reward="logprob", device="cpu")
    rate = reward_model.rate_by(rating, scorer)
    log = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    verl = compute_score(
        "", completion, "", {"prompt": prompt}, add_eos=False, model=folder, device="cpu"
    )
    found = {
        "score_text": scorer.score_text([prompt], [[completion]]).reward("logprob").item(),
        "score": by_command(folder, tmp_path, {"prompt": prompt, "completion": completion}),
        "/score": by_server(scorer, {"prompt": prompt, "completions": [completion]}),
        "OpenRLHF": SelfReward(folder)([prompt + completion], [prompt], [None])["rewards"].item(),
        "NeMo-RL": nemo_rl.rate_logs(tokenizer, rate, [log], add_eos=False)[0],
        "verl": asyncio.run(verl)["score"],
    }
    assert found == pytest.approx(dict.fromkeys(found, want), abs=2e-5)


def test_an_answer_ends_with_what_its_template_writes(tmp_path):
    tokenizer = bytes_of_text()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tokenizer.chat_template = CHAT
    model = saved(tmp_path / "model", tokenizer)
    text = str(tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True))
    before = tokenizer.encode(text, add_special_tokens=False)
    answer = [*tokenizer.encode("4", add_special_tokens=False), tokenizer.get_vocab()["<turn>"]]
    want = by_hand(model, before, answer)
    folder = str(tmp_path / "model")
    scorer = Scorer(folder, device="cpu")
    rating = reward_model.Rating(model=folder, reward="logprob", device="cpu")
    rate = reward_model.rate_by(rating, scorer)
    log = [{"role": "user", "content": text}, {"role": "assistant", "content": "4"}]
    verl = compute_score("", "4", "", {"prompt": MESSAGES}, model=folder, device="cpu")
    record = {"prompt": MESSAGES, "completion": "4"}
    body = {"prompt": MESSAGES, "completions": ["4"], "add_eos": True}
    found = {
        "score_text": scorer.score_text([text], [["4"]], add_eos=True).reward("logprob").item(),
        "score": by_command(folder, tmp_path, record, "--add-eos"),
        "/score": by_server(scorer, body),
        "NeMo-RL": nemo_rl.rate_logs(tokenizer, rate, [log])[0],
        "verl": asyncio.run(verl)["score"],
    }
    assert found == pytest.approx(dict.fromkeys(found, want), abs=2e-5)


def test_a_trainers_padding_is_not_rated(tmp_path):
    tokenizer = bytes_of_text()
    tokenizer.chat_template = CHAT
    model = saved(tmp_path / "model", tokenizer)
    folder = str(tmp_path / "model")
    scorer = Scorer(folder, device="cpu")
    rate = reward_model.rate_by(reward_model.Rating(model=folder, device="cpu"), scorer)
    prompt = tokenizer.encode("Q: ", add_special_tokens=False)
    want = by_hand(model, prompt, tokenizer.encode(f"8{EOS}", add_special_tokens=False))
    padded = f"8{EOS}" + PAD * 20
    log = [{"role": "user", "content": "Q: "}, {"role": "assistant", "content": padded}]
    found = {
        "OpenRLHF": SelfReward(folder)(["Q: " + padded], ["Q: "], [None])["rewards"].item(),
        "NeMo-RL": nemo_rl.rate_logs(tokenizer, rate, [log])[0],
    }
    assert found == pytest.approx(dict.fromkeys(found, want), abs=2e-5)
    conversation = [*MESSAGES, {"role": "assistant", "content": padded}]
    plain = [*MESSAGES, {"role": "assistant", "content": f"8{EOS}"}]
    (with_padding,) = ms_swift.rate_rows(tokenizer, rate, [padded], [conversation])
    (without,) = ms_swift.rate_rows(tokenizer, rate, [f"8{EOS}"], [plain])
    assert with_padding == pytest.approx(without, abs=1e-6)
