"""Tasks of lm-evaluation-harness from local files: what there is to score, in small."""

import json
import random
from pathlib import Path

TEXT = "the cat sat on a mat and saw many odd birds fly over green hills at dawn"

YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {folder}/cache
  data_files:
    test: {folder}/{name}.jsonl
    fewshot: {folder}/{name}.jsonl
test_split: test
fewshot_split: fewshot
fewshot_config:
  sampler: first_n
{fields}
metadata:
  version: 1
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
LAST = """\
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""
WRITE = """\
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{target}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def prose(n: int, seed: int) -> str:
    """About `n` characters of words."""
    draw, words = random.Random(seed), TEXT.split()
    text = ""
    while len(text) < n:
        text += draw.choice(words) + " "
    return text[:n].rstrip()


def choice_rows(n: int, length: int, choices: int, seed: int) -> list[dict]:
    """Questions of `length` characters, each with choices of unequal lengths."""
    return [
        {
            "context": prose(length, seed + i),
            "choices": [prose(3 + 4 * c, 100 * seed + 10 * i + c) for c in range(choices)],
            "label": i % choices,
        }
        for i in range(n)
    ]


def write_tasks(folder: Path, last: list[dict]) -> Path:
    """A folder of tasks; `last` are the rows of the one that asks for greedy continuations."""
    rolling = [{"text": prose(n, n)} for n in (1200, 40, 700, 1)]
    tasks = {
        "shared": (CHOICE, choice_rows(4, 180, 8, seed=1)),
        "two": (CHOICE, choice_rows(6, 20, 2, seed=2)),
        # longer than the context of the model
        "cut": (CHOICE, choice_rows(2, 900, 3, seed=3)),
        "nothing": (CHOICE, [row | {"context": ""} for row in choice_rows(3, 1, 4, seed=4)]),
        "rolling": (ROLLING, rolling),
        "last": (LAST, last),
        "write": (WRITE, [{"context": prose(30, i), "target": "x"} for i in range(3)]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (fields, rows) in tasks.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, folder=folder, fields=fields))
    return folder
