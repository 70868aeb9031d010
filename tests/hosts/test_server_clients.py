"""Clients of the server: OpenAI's, lm-eval, the requests of trainers, rows of hosts."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import lm_eval
import openai
import pytest
import torch
from lm_eval.tasks import TaskManager

from helpers.server_desk import PROMPT, RIGHT, WRONG
from helpers.serving import serving
from sharpen.evaluation.parity import server_logprobs
from sharpen.integrations.openrlhf import SelfReward
from sharpen.integrations.reward_model import Rating, rate_by
from sharpen.models import SHIPPED
from sharpen.sampling.endpoint import EndpointClient
from sharpen.scoring import Scorer

PATH = str(SHIPPED["game24"])


@pytest.fixture(scope="module")
def server():
    with serving("game24") as server:
        yield server


@pytest.fixture(scope="module")
def offline():
    return Scorer("game24", device="cpu")


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_client_reads_log_probs(client, offline):
    ids = offline.tokenizer.encode(PROMPT + RIGHT)
    asked = {"model": "game24", "echo": True, "max_tokens": 1, "temperature": 0, "logprobs": 2}
    answer = client.completions.create(prompt=[ids, opening(offline)], **asked)
    assert [choice.index for choice in answer.choices] == [0, 1]
    found = answer.choices[0].logprobs
    want = offline.score([ids[:1]], [[ids[1:]]]).tokens.logprob
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:-1] == pytest.approx(want.tolist(), abs=1e-5)
    assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == len(ids) + 1
    assert answer.usage.prompt_tokens == len(ids) + len(opening(offline))
    assert [model.id for model in client.models.list()] == ["game24"]


def opening(offline):
    return offline.tokenizer.encode(PROMPT)


def test_openai_client_reads_refusals(client):
    with pytest.raises(openai.UnprocessableEntityError, match="`n` is not supported"):
        client.completions.create(model="game24", prompt="x", n=2, max_tokens=1)
    with pytest.raises(openai.NotFoundError, match="`model` must be 'game24'"):
        client.completions.create(model="gpt-5", prompt="x", max_tokens=1)


def tasks(folder):
    """A multiple-choice and a perplexity task from JSON lines files."""
    questions = [
        {
            "question": f"Numbers: {a} 4 6 8 Target: 24\n",
            "choices": [WRONG, RIGHT, "8 / 4 = 2"],
            "answer": 1,
        }
        for a in (1, 2, 3, 4, 5)
    ]
    pages = [{"text": PROMPT + RIGHT}, {"text": PROMPT + WRONG + "\n" + WRONG}]
    for name, rows in (("questions", questions), ("pages", pages)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "test_split": "test"}
    return [
        shared
        | {
            "task": "questions",
            "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        shared
        | {
            "task": "pages",
            "output_type": "loglikelihood_rolling",
            "dataset_kwargs": {"data_files": {"test": str(folder / "pages.jsonl")}},
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        },
    ]


@pytest.mark.filterwarnings("ignore")  # of lm-eval and of datasets
def test_lm_eval_through_the_server_equals_hf(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    remote = f"model=game24,base_url={server.url}/v1/completions,tokenizer={PATH},max_length=1024"
    # it adds none by itself, where the other does as the tokenizer does
    bos = "add_bos_token=True"
    before = server.metrics()
    found = {}
    for name, arguments in {
        "local-completions": f"{remote},{bos},num_concurrent=16",
        "hf": f"pretrained={PATH},device=cpu,dtype=float32,{bos}",
    }.items():
        found[name] = lm_eval.simple_evaluate(
            model=name,
            model_args=arguments,
            tasks=tasks(tmp_path),
            bootstrap_iters=0,
            task_manager=TaskManager(),
            log_samples=True,
        )
    ours, theirs = (
        [
            (float(x), y)
            for task in ("questions", "pages")
            for sample in found[name]["samples"][task]
            for x, y in flat(sample["resps"])
        ]
        for name in ("local-completions", "hf")
    )
    assert len(ours) == 5 * 3 + 2
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], rel=1e-5)
    assert [y for _, y in ours] == [y for _, y in theirs]
    for task, metric in (("questions", "acc,none"), ("pages", "byte_perplexity,none")):
        got, want = (found[name]["results"][task][metric] for name in found)
        assert math.isclose(got, want, rel_tol=1e-5)
    after = server.metrics()
    asked = 'sharpen_requests_total{route="/v1/completions",status="200"}'
    assert after[asked] - before.get(asked, 0) == len(ours)


def flat(responses):
    """(log-prob, greedy) of each request of a sample; a rolling one has no second."""
    for response in responses:
        for one in response:
            yield one if isinstance(one, (tuple, list)) else (one, None)


def test_openrlhf_gets_the_same_over_http_and_from_its_file(server):
    texts = [RIGHT, WRONG, "8 + 4 = 12", "8 / 4 = 2"]
    asked = [
        {"query": [PROMPT + text], "prompts": [PROMPT], "labels": ["24"]} for text in texts * 4
    ]
    reward_func = SelfReward("game24")
    with ThreadPoolExecutor(16) as pool:
        remote = list(pool.map(lambda body: server.post("/get_reward", body), asked))
        local = list(pool.map(lambda b: reward_func(b["query"], b["prompts"], b["labels"]), asked))
    # as OpenRLHF reads them
    got = torch.tensor([answer["rewards"][0] for answer in remote])
    want = torch.cat([answer["rewards"] for answer in local])
    assert torch.allclose(got, want, atol=1e-4)
    assert got[0] > got[1]
    assert torch.allclose(got.view(4, 4), got[:4].expand(4, 4), atol=1e-5)
    for answer in remote:
        assert answer["scores"] == answer["rewards"]
        assert all(isinstance(x, float) for log in answer["extra_logs"].values() for x in log)


def test_llama_factory_gets_a_score_a_conversation(server, offline):
    body = {"model": "model", "messages": [PROMPT + RIGHT, PROMPT + WRONG]}
    scores = torch.Tensor(server.post("/v1/score/evaluation", body)["scores"])
    ids = [offline.tokenizer.encode(x, add_special_tokens=False) for x in body["messages"]]
    want = offline.score([x[:1] for x in ids], [[x[1:]] for x in ids]).reward("logprob")
    assert torch.allclose(scores, want, atol=1e-4)


def test_rows_that_fill_the_context_are_rated_through_the_server(server, offline):
    prompt, completion = opening(offline), [7, 9] * 512
    completion = completion[: 1024 - len(prompt)]
    scores = offline.score([prompt], [[completion]])
    url = f"{server.url}/v1"
    (((*found,),),) = server_logprobs(EndpointClient(url), "game24", [prompt], [[completion]])
    assert found == pytest.approx(scores.tokens.logprob.tolist(), abs=1e-4)
    rate = rate_by(Rating(endpoint=url, endpoint_model="game24"))
    ((reward,),) = rate([prompt], [[completion]])
    assert reward == pytest.approx(scores.reward("logprob").item(), rel=1e-5)


def test_samples_without_a_reward_get_the_chosen_one_and_are_counted():
    long = PROMPT + "8 " * 1100
    with serving("game24", "--unscorable-reward", "-1000") as server:
        ask = {"query": [PROMPT], "prompts": [PROMPT], "labels": ["24"]}
        found = server.post("/get_reward", ask)
        assert (found["rewards"], found["extra_logs"]["unscorable"]) == ([-1000.0], [1.0])
        assert server.post("/get_reward", ask | {"query": [long]})["rewards"] == [-1000.0]
        scores = server.post("/v1/score/evaluation", {"messages": ["8", PROMPT + RIGHT, "8"]})
        assert scores["scores"][::2] == [-1000.0] * 2
        assert -1000 < scores["scores"][1] < 0
        # a text of so many characters is not even tokenised
        endless = PROMPT + "8 " * (256 * 1024)
        assert server.post("/get_reward", ask | {"query": [endless]})["rewards"] == [-1000.0]
        status, said, _ = server.ask("/score", {"prompt": endless, "completions": []})
        assert (status, said["error"]["code"]) == (422, "too_long")
        seen = server.metrics()
        code, log = server.end()
    assert seen['sharpen_unscorable_total{cause="empty"}'] == 3
    assert seen['sharpen_unscorable_total{cause="too_long"}'] == 2
    assert code == 0
    assert log.count("a response has no reward") == 2
