"""`study.md`: the tables of a study as Markdown, beside its figures."""

from .figures import Study
from .figures import figure_files as figure_files
from .tables import (
    auroc_table,
    band,
    covariance_table,
    decoding_table,
    percent,
    power_table,
    rounds_table,
    selection_facts_table,
    selection_table,
    stages_table,
    training_table,
    under_power_table,
)

TITLES = {
    "sft": "SFT-Sharpening: the best of N samples by log-prob, fitted; all prompts and samples",
    "sft-round2": "a second round: samples of the model of `sft`, by its own log-prob",
    "sft-round3": "a third round",
    "sft-greedy": "a second round: what greedy decoding of the model of `sft` finds, one a prompt",
    "sft-greedy2": "a third round of that kind",
    "sft-transductive": "SFT-Sharpening, transductive: fitted on the test prompts themselves",
    "sft-equal": "SFT-Sharpening on as many samples as the objectives below",
    "soft-sft": "power self-distillation: all samples, by p^(alpha - 1)",
    "rlhf": "RLHF-Sharpening: square loss of Eq. (8) on random pairs",
    "dpo": "DPO on the best and the worst sample",
    "xpo": "XPO: rounds of new samples, optimism",
}


def headline(study: Study) -> str:
    """What a reader wants first, in plain text."""
    by = {(row["group"], row["name"], row["n"]): row for row in study["rows"]}
    n = study["target_n"]
    facts = [
        ("greedy", by["decoding", "greedy", None]),
        ("one sample", by["decoding", "T = 1", None]),
        (f"best-of-{n}, logprob", by["selection", "best-of-N, logprob", n]),
    ]
    facts += [(f"{row['name']}", row) for row in study["rows"] if row["group"] == "training"]
    lines = [f"{study['prompts']} test prompts, accuracy in % with its 95 % band over prompts"]
    for name, row in facts:
        share = (row.get("gap_closed") or {}).get("share")
        closed = "" if share is None else f"  closes {100 * share:.0f} % of the gap"
        lines.append(f"{name:24s}{percent(row['accuracy']):>6s}  {band(row['ci95'])}{closed}")
    return "\n".join(lines)


def format_page(study: Study) -> str:
    """The whole page."""
    settings = study["settings"]
    total = sum(stage["seconds"] for stage in study["stages"])
    quick = " This is a quick run, too small to rely on." if settings["quick"] else ""
    machine = study["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    flags = " --quick" if settings["quick"] else ""
    flags += f" --train-seeds {settings['train_seeds']}"
    if machine["jobs"] > 1:
        flags += f" --jobs {machine['jobs']}"
    command = f"sharpen study {settings['task']}{flags}"
    parts = [
        f"# Study: {settings['task']}",
        f"`{command}` on {study['prompts']} test prompts, {settings['seeds']} seeds of samples and "
        f"{settings['train_seeds']} of training: "
        f"{len(study['stages'])} runs, {total / 60:.1f} minutes in all, {machine['jobs']} at a "
        f"time, {machine['threads']} threads ({versions}). Accuracies are in % with 95 % bands: a "
        f"bootstrap over prompts of their mean over seeds. Log-probs are those of the base model, "
        f"in nats.{quick}",
        decoding_table(study),
        "## Selection\n\n![Accuracy against N](selection.svg)",
        "Expectations over subsets of one pool of samples a seed: exact for best-of-N, else over "
        "random subsets. The KL to the base is at most log N - (N - 1)/N nats for best-of-N by a "
        "fixed reward, and not known for the others; lengths, tokens and KL are at the largest N.",
        selection_table(study),
        selection_facts_table(study),
        "## Samplers of the power distribution\n\n![Accuracy against tokens](power.svg)",
        power_table(study),
        "## Trained models\n\n![Accuracy of trained models](training.svg)",
        training_table(study),
        "\n".join(f"- `{name}`: {title}." for name, title in TITLES.items()),
        rounds_table(study),
        "## Does the self-reward follow the true one?\n\n![AUROC](auroc.svg)",
        auroc_table(study),
        "![Covariance](covariance.svg)",
        covariance_table(study),
        under_power_table(study),
        "## Every run\n",
        stages_table(study),
    ]
    return "\n\n".join(parts) + "\n"
