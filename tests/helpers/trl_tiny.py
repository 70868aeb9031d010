"""Tiny trainers of TRL's on the vocabulary of the shipped tokenizer, and batches as they see them.

B sequences, P padded prompt length, C padded completion length, V vocabulary.
"""

import copy
import functools
import importlib

import torch
from datasets import Dataset
from transformers import PrinterCallback

from helpers.tiny import tiny
from sharpen.models import load_tokenizer

V = 214
QUIET = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "seed": 0,
    "logging_steps": 1,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
PROMPTS = ["Numbers: 4 4 6 8 Target: 24\n", "Numbers: 1 2 3 4 Target: 24\n"]


@functools.cache
def saved(folder, family="llama", **changes):
    """A random model in `folder` with the tokenizer of game24; TRL loads references by path."""
    model = tiny(family, vocab_size=V, max_position_embeddings=256, **changes)
    tokenizer = load_tokenizer("game24")
    for ids in (model.config, model.generation_config):
        ids.pad_token_id, ids.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        ids.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def evens(prompts, completions, **kwargs):
    """A reward that needs no model: how many ids are even."""
    return [float(sum(i % 2 == 0 for i in ids)) for ids in kwargs["completion_ids"]]


def online(kind, folder, out, *, shared, reward=evens, prompts=PROMPTS, model=None, **options):
    """A GRPO or RLOO trainer, TRL's own or ours."""
    trl = importlib.import_module("trl")
    ours = importlib.import_module("sharpen.integrations.trl.trainers")
    names = ("peft_config", "callbacks", "tokenizer", "rollout_func")
    peft_config, callbacks, tokenizer, rollout = (options.pop(name, None) for name in names)
    defaults = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 9}
    args = getattr(trl, f"{kind}Config")(output_dir=str(out), **(QUIET | defaults | options))
    trainer_class = (
        getattr(ours, f"SharedPrefix{kind}Trainer") if shared else getattr(trl, f"{kind}Trainer")
    )
    trainer = trainer_class(
        model=model or folder,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        processing_class=tokenizer or load_tokenizer("game24"),
        peft_config=copy.deepcopy(peft_config),
        callbacks=callbacks,
        **({"rollout_func": rollout} if rollout else {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def batch(seed=0, *, group=4):
    """Two prompts of unequal lengths, `group` ragged completions each: ids, mask and C.

    Prompts are padded on the left and completions on the right, as TRL's online trainers do.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(3, V, (n,), generator=generator).tolist()

    prompts = [ids(n) for n in (21, 9)]
    lengths = torch.randint(1, 12, (2 * group,), generator=generator).tolist()
    completions = [ids(n) for n in lengths]
    P, C = max(map(len, prompts)), max(lengths)
    rows, mask = [], []
    for i, completion in enumerate(completions):
        prompt = prompts[i // group]
        before, after = P - len(prompt), C - len(completion)
        rows.append([0] * before + prompt + completion + [0] * after)
        mask.append([0] * before + [1] * (len(prompt) + len(completion)) + [0] * after)
    return torch.tensor(rows), torch.tensor(mask), C


def gradients(model):
    """By name, those that there are."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
