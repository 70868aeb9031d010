"""Build entry point; what is not optional is declared in pyproject.toml.

The CPU kernel is compiled here, by the function that compiles it on first use, where that can
already be done: torch is importable (a build without isolation), a compiler is found, and this CPU
runs the kernel (`SHARPEN_BUILD_CPU=1` builds for another that does, `=0` never builds). The file's
name is a hash of the sources and of torch's version: under another torch it is not loaded, and
first use compiles. An editable install fills the user's cache, any other its own package; such a
wheel carries a platform's tag. A build that fails is told in one line, and the install goes on.
"""

import importlib.util
import os
import runpy
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

PACKAGE = "sharpen_kernels"
LIBRARY = Path(__file__).parent / "kernels" / PACKAGE / "_cpu_library.py"


class BuildWithKernel(build_py):
    """Copies the Python files, then adds the compiled kernel if it can be had."""

    def run(self) -> None:
        """Build; a kernel that cannot be compiled is a warning."""
        super().run()
        folder = Path(self.build_lib, PACKAGE)
        for old in folder.glob("cpu-*.so"):
            old.unlink()
        wanted = os.environ.get("SHARPEN_BUILD_CPU")
        if wanted == "0" or importlib.util.find_spec("torch") is None:
            return
        try:
            # run as a file: importing the package would import all of it
            library = runpy.run_path(str(LIBRARY))
            if wanted == "1" or library["instructions"]():
                library["build"]() if self.editable_mode else library["compile_into"](folder)
        except Exception as error:  # whatever it is, the package works without
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.warn(f"the CPU kernel is compiled on first use instead. {reason}")


class TaggedWheel(bdist_wheel):
    """Any platform's wheel, unless it holds the compiled kernel."""

    def get_tag(self) -> tuple[str, str, str]:
        """Tags of the Python, its ABI and the platform."""
        python, abi, platform = super().get_tag()
        if any((Path(str(self.bdist_dir)) / PACKAGE).glob("cpu-*.so")):
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return python, abi, platform


setup(cmdclass={"build_py": BuildWithKernel, "bdist_wheel": TaggedWheel})
