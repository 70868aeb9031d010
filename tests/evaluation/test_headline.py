import re

from sharpen.evaluation.summary import format_table, headline_rows

HEADS = ["accuracy, %", "N=1", "5", "6", "95 % at 6", "over greedy", "over one sample", "p"]


def test_rows_are_baselines_then_rewards_then_the_ceiling(make_outcome, summary_of):
    rows = headline_rows(summary_of(make_outcome(P=7, G=6), temperature=0.5))
    assert [row.name for row in rows] == [
        "Greedy",
        "One sample, T=0.5",
        "Best of N, logprob",
        "Best of N, mean_logprob",
        "Best of N, majority",
        "Pass@N",
    ]
    assert [row.gain is None for row in rows] == [True, True, False, False, False, True]


def test_plain_table_is_aligned_and_says_every_figure(make_outcome, summary_of):
    summary = summary_of(make_outcome(P=7, G=6))
    lines = format_table(summary).splitlines()
    assert lines[:2] == ["game24, model tiny, 7 prompts, n = 6, seed 0", ""]
    assert re.split(r" {2,}", lines[2]) == HEADS
    assert len(lines) == 9
    assert max(map(len, lines)) <= 100
    own = next(line for line in lines if line.startswith("Best of N, logprob"))
    best = summary["accuracy"]["best_of_n"]["logprob"]
    assert own.split()[4:7] == [f"{100 * best[k]:.1f}" for k in ("1", "5", "6")]
    assert own.endswith(f"{summary['p_value_vs_sample']['logprob']['6']:.4f}")


def test_plain_table_without_a_checker_holds_log_probabilities(make_outcome, summary_of):
    summary = summary_of(make_outcome(checker=False), task=None)
    lines = format_table(summary).splitlines()
    assert lines[0] == "model tiny, 7 prompts, n = 6, seed 0"
    assert lines[2].split("  ")[0] == "log-probability of the chosen, nats"
    nats = summary["mean_logprob_of_chosen"].values()
    assert lines[3].split()[4:] == [f"{x:.2f}" for x in nats]
