"""verl's own reward loop around our manager and our function, in an environment that has verl.

Its pins exclude those of the other hosts: an environment .venv-verl, or the interpreter that
SHARPEN_VERL_PYTHON names, with verl 0.9.1, tensordict, ray, omegaconf, hydra-core, codetiming and
transformers 5.10.
"""

import ast

import pytest

from helpers.other_pythons import code_block, python_of, run

HOW = "run `make verl`, or name an interpreter with verl 0.9.1 in SHARPEN_VERL_PYTHON"


@pytest.fixture
def verl_python():
    return python_of(".venv-verl", "SHARPEN_VERL_PYTHON", HOW)


def test_the_page_runs_and_the_rewards_are_those_of_the_scorer(verl_python, tmp_path):
    code = code_block("verl.md")
    out = run(verl_python, "-c", code, cwd=tmp_path)
    found, wanted, *placed = [line for line in out.splitlines() if line]
    found, wanted = ast.literal_eval(found), ast.literal_eval(wanted)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert len(set(found)) == 4
    # each reward stands at the last token of its response, all else is 0
    text = "".join(placed)
    rows = ast.literal_eval(text[text.index("[[") : text.index("]]") + 2])
    last = [2, 1, 0, 3]
    for row, position, reward in zip(rows, last, found, strict=True):
        assert row[position] == pytest.approx(reward, abs=1e-3)
        assert sum(x != 0 for x in row) == 1


FUNCTION = """
manager = {"source": "register", "name": "naive", "module": None}
options = {"model": base, "reward": "mean_logprob", "device": "cpu"}
config.reward.reward_manager = manager
config.reward.custom_reward_function = {
    "path": "pkg://sharpen.integrations.verl", "name": "compute_score", "reward_kwargs": options
}
text = "Numbers: 4 4 6 8 Target: 24\\n"
def objects(values):
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out
data = DataProto.from_dict(tensors=batch, non_tensors={
    "data_source": objects(["game24"] * 4),
    "reward_model": objects([{"ground_truth": "24"} for _ in range(4)]),
    "extra_info": objects([{"prompt": text} for _ in range(4)]),
})
async def rate():
    # verl's naive manager keeps the loop that it is made in, which is its actor's
    return await RewardLoopWorker(config).compute_score_batch(data)
found = asyncio.run(rate())
rewards = [one["reward_score"] for one in found]
texts = [scorer.tokenizer.decode(r, skip_special_tokens=True) for _, r in rows]
print([one["reward_extra_info"]["self_reward"] for one in found] == rewards)
print(rewards)
print(scorer.score_text([text], [texts], add_eos=True).reward("mean_logprob").tolist())
"""


def test_the_function_runs_under_verls_own_manager(verl_python, tmp_path):
    page = code_block("verl.md")
    setup = page[: page.index("worker =")] + 'scorer = sharpen.Scorer("game24", device="cpu")\n'
    out = run(verl_python, "-c", setup + FUNCTION, cwd=tmp_path)
    same, found, wanted = out.splitlines()[-3:]
    assert same == "True"
    assert ast.literal_eval(found) == pytest.approx(ast.literal_eval(wanted), abs=1e-4)
