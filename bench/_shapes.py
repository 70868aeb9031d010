"""The tasks of a whole run: heads of real models, as many rows as the device is made for."""

from bench._tasks import WHATS, Task

HEADS = {  # (hidden, vocabulary)
    "Game of 24, ships here": (128, 204),
    "Qwen2.5-0.5B": (896, 151_936),
    "Llama-3.2-1B": (2048, 128_256),
    "Phi-3-mini": (3072, 32_064),
    "Mistral-7B": (4096, 32_768),
    "Llama-3.1-8B": (4096, 128_256),
}
K = 1024


def cpu_tasks() -> list[Task]:
    """Few rows, and one head that is narrower than its model's: under 15 minutes in all."""
    tasks = []
    for dtype in ("bfloat16", "float32"):
        for what in WHATS["linear_logprob"]:
            for shape in ((4 * K, *HEADS["Game of 24, ships here"]), (256, 896, 32_768)):
                tasks.append(Task("linear_logprob", what, shape, dtype, "cpu"))
        tasks.append(Task("linear_logprob", "forward", (64, *HEADS["Qwen2.5-0.5B"]), dtype, "cpu"))
        tasks.append(Task("linear_logprob", "forward", (64, *HEADS["Phi-3-mini"]), dtype, "cpu"))
        for what in WHATS["token_logprob"]:
            for shape in ((4 * K, 204), (64, 151_936)):
                tasks.append(Task("token_logprob", what, shape, dtype, "cpu"))
    return tasks


def gpu_tasks() -> list[Task]:
    """From 1 k to 64 k rows; the most telling first, for a run that is cut short."""
    hidden = [(8 * K, *head) for name, head in HEADS.items() if not name.startswith("Game")]
    wide, narrow = HEADS["Llama-3.1-8B"], HEADS["Qwen2.5-0.5B"]
    tasks = [Task("linear_logprob", "forward", shape, "bfloat16", "cuda") for shape in hidden]
    for what in ("statistics", "forward+backward"):
        for head in (wide, narrow):
            tasks.append(Task("linear_logprob", what, (8 * K, *head), "bfloat16", "cuda"))
    for what in WHATS["token_logprob"]:
        for shape in ((4 * K, 151_936), (16 * K, 32_768)):
            tasks.append(Task("token_logprob", what, shape, "bfloat16", "cuda"))
    for rows in (K, 64 * K):
        for head in (narrow, wide):
            tasks.append(Task("linear_logprob", "forward", (rows, *head), "bfloat16", "cuda"))
    tasks.append(Task("linear_logprob", "forward", (8 * K, *narrow), "float32", "cuda"))
    tasks.append(Task("token_logprob", "forward", (4 * K, 151_936), "float32", "cuda"))
    return tasks


def all_tasks(device: str) -> list[Task]:
    """The tasks of `make bench` on a device."""
    return gpu_tasks() if device == "cuda" else cpu_tasks()
