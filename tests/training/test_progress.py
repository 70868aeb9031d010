"""The bar of a fit: one on the first process, which begins where a resumed run stopped."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from sharpen.training.fit import Progress


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), report_to=[])


def test_the_bar_of_a_resumed_run_begins_where_it_stopped(arguments, capsys):
    state = TrainerState(global_step=900, max_steps=1000)
    bar = Progress()
    bar.on_train_begin(arguments, state, TrainerControl())
    shown = bar.training_bar
    assert (shown.initial, shown.n, shown.total) == (900, 900, 1000)
    state.global_step = 901
    bar.on_step_end(arguments, state, TrainerControl())
    assert shown.n == 901
    bar.on_train_end(arguments, state, TrainerControl())
    assert "train:  90%" in capsys.readouterr().err


def test_other_processes_show_none(arguments, capsys):
    state = TrainerState(max_steps=10, is_world_process_zero=False)
    bar = Progress()
    bar.on_train_begin(arguments, state, TrainerControl())
    assert bar.training_bar is None
    assert capsys.readouterr().err == ""
