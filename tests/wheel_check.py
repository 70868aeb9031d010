"""The built wheel in an environment that holds nothing else: imports, command line, file list.

    python tests/wheel_check.py FOLDER_WITH_THE_WHEEL

Then once more with Hugging Face's `kernels` installed beside it, from the repository root, where
a folder of that name stands in the way.
"""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
NEEDED = [
    "sharpen/evaluation/report.css",
    "sharpen/evaluation/report.html.jinja",
    "sharpen/py.typed",
    "sharpen/tasks/game24/base_model/model.safetensors",
    "sharpen/tasks/game24/base_model/tokenizer.json",
    "sharpen_kernels/cpu/linear_logprob.cpp",
    "sharpen_kernels/cpu/tile.h",
    "sharpen_kernels/linear_logprob.py",
]
BOTH = "import transformers, sharpen; from transformers import LlamaForCausalLM"


def run(*command: object, cwd: Path) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"wheel_check: {' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def check_files(wheel: Path) -> None:
    """The wheel holds what it needs, and no top-level `kernels`, tests or bench."""
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in NEEDED if name not in names]
    assert not missing, f"the wheel lacks {missing}"
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"sharpen", "sharpen_kernels"}, tops


def main() -> None:
    """Build an environment around the one wheel of the folder and use it."""
    folder = Path(sys.argv[1]).resolve()
    (wheel,) = folder.glob("*.whl")
    check_files(wheel)
    venv.create(folder / "env", with_pip=True, clear=True)
    python = folder / "env" / "bin" / "python"
    sharpen = folder / "env" / "bin" / "sharpen"
    pip = (python, "-m", "pip", "install", "--quiet")
    run(*pip, TORCH, cwd=folder)
    run(*pip, "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
    where = run(python, "-c", "import sharpen; print(sharpen.__file__)", cwd=folder)
    assert str(folder / "env") in where, where
    assert "game24" in run(sharpen, "tasks", cwd=folder)
    bon = [
        "bon",
        "--model",
        "game24",
        "--task",
        "game24",
        "--limit",
        "2",
        "-n",
        "2",
        "--max-new-tokens",
        "40",
        "--out",
        "run",
    ]
    assert "report:" in run(sharpen, *bon, cwd=folder)
    run(python, "-c", BOTH, cwd=ROOT)
    run(*pip, "kernels", cwd=folder)
    beside = f"{BOTH}; import kernels; assert 'site-packages' in kernels.__file__"
    run(python, "-c", beside, cwd=ROOT)
    sys.stdout.write(f"{wheel.name}: 6 passed, 0 failed\n")


if __name__ == "__main__":
    main()
