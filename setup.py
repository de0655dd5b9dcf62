"""The native assignment solver, built once for each instruction set, and the example specs; the rest is pyproject.toml.

The solver is optional: without a C++ compiler the package installs all the same, and exact plans come from lapx.
"""

import os
import platform
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

SOURCES = "pipelines/transport/native"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]


def solver(level: str, flags: list[str]) -> Extension:
    return Extension(
        f"pipelines.transport.native._assignment_{level}",
        sources=[f"{SOURCES}/assignment.cpp"],
        depends=[f"{SOURCES}/{name}.h" for name in ("kernels", "points", "potentials", "solver")],
        extra_compile_args=FLAGS + flags,
        language="c++",
        optional=True,
    )


class BuildWithConfigs(build_py):
    """Copies ``configs/`` into the wheel; an editable installation reads them from the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib, "services", "configs"), dirs_exist_ok=True)


extensions = []
if os.name == "posix":
    extensions.append(solver("baseline", []))
    if platform.machine() in ("x86_64", "AMD64"):
        extensions += [solver("avx2", AVX2), solver("avx512", AVX512)]

setup(ext_modules=extensions, cmdclass={"build_py": BuildWithConfigs})
