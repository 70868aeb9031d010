"""The page of TRL does what it says: its Python is run, then its YAML by TRL's own command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from test_layers import ROOT

PAGE = (ROOT / "docs" / "hosts" / "trl.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run(command, folder):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_page_runs(tmp_path):
    code = blocks("python")
    assert len(code) == 3
    (tmp_path / "page.py").write_text("\n".join(code), encoding="utf-8")
    printed = run([sys.executable, "page.py"], tmp_path)
    rewards, losses = (json.loads(x) for x in re.findall(r"^(\[.*\])$", printed, re.MULTILINE))
    assert len(rewards) == 4
    assert all(x < 0 for x in rewards)
    # log 2 before the first step, less after it
    assert abs(losses[0] - 0.6931) < 1e-3 < losses[0] - losses[1]
    (config,) = blocks("yaml")
    (tmp_path / "run.yaml").write_text(config, encoding="utf-8")
    data = tmp_path / yaml.safe_load(config)["dataset_name"]
    data.mkdir()
    line = json.dumps({"prompt": "Numbers: 4 4 6 8 Target: 24\n"}) + "\n"
    (data / "train.jsonl").write_text(line * 4)
    for verb in ("grpo", "rloo"):
        command = [str(Path(sys.executable).parent / "trl"), verb, "--config", "run.yaml"]
        printed = run([*command, "--output_dir", verb], tmp_path)
        assert printed.count("'self_reward/mean_logprob/mean'") == 2, printed[-3000:]
        assert printed.count("'rewards/self_reward/mean'") == 2
        assert (tmp_path / verb / "model.safetensors").is_file()
