"""The recipe of the shipped model: what it sees, what it never sees, that it learns."""

import json
import random
import sys

import torch

from sharpen.experiments.game24 import train_base
from sharpen.experiments.game24.train_base import build_tokenizer, model_card
from sharpen.models import SHIPPED, load_model, load_tokenizer
from sharpen.tasks.game24.puzzles import integer_solutions, split_puzzles
from sharpen.tasks.game24.traces import is_solution, prompt_text, trace_text


def test_random_problems_are_true_and_never_have_the_target_24():
    rng = random.Random(0)
    for _ in range(300):
        numbers, target, steps = train_base.random_problem(rng)
        assert target != 24
        assert 1 <= target <= 100
        assert is_solution(trace_text(numbers, steps), numbers, target)


def test_base_problems_come_from_the_base_split_alone():
    rng = random.Random(0)
    puzzles = [p for p in split_puzzles("base") if integer_solutions(p)]
    held_out = {*split_puzzles("sharpen"), *split_puzzles("test")}
    for _ in range(300):
        numbers, target, steps = train_base.base_problem(rng, puzzles)
        assert numbers not in held_out
        assert is_solution(trace_text(numbers, steps), numbers, target)


def test_only_the_completion_and_its_end_carry_loss():
    tokenizer = build_tokenizer()
    puzzle = split_puzzles("base")[0]
    steps = integer_solutions(puzzle)[0]
    ids, labels = train_base.encode([(puzzle, 24, steps)], tokenizer)
    seen = labels[0][labels[0] != train_base.IGNORED].tolist()
    assert seen[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(seen[:-1]) == trace_text(puzzle, steps)
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text == prompt_text(puzzle) + trace_text(puzzle, steps)


def test_a_short_run_learns_and_writes_a_loadable_folder(tmp_path, monkeypatch):
    out = tmp_path / "model"
    argv = ["train_base", "--out", str(out), "--steps", "12", "--batch", "32", "--lr", "0.005"]
    monkeypatch.setattr(sys, "argv", argv)
    train_base.main()
    card = json.loads((out / "training.json").read_text())
    # a uniform guess over the vocabulary costs log 214 = 5.37 nats
    assert card["metrics"]["final_batch_loss_nats"] < 5
    model, tokenizer = load_model(out, device="cpu"), load_tokenizer(out)
    ids = torch.tensor([tokenizer("Numbers: 1 2 3 4 Target: 24\n")["input_ids"]])
    assert model(ids).logits.shape[-1] == len(tokenizer) == 214
    assert (out / "README.md").read_text() == model_card(card)


def test_the_shipped_card_says_what_the_training_recorded():
    folder = SHIPPED["game24"]
    card = json.loads((folder / "training.json").read_text())
    assert (folder / "README.md").read_text() == model_card(card)
    assert 0.25 <= card["metrics"]["sharpen_greedy"] <= 0.75
