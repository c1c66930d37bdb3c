"""Builds the C++ kernels of `lowbit`: one plain shared library beside the package, loaded by ctypes.

Everything else is in pyproject.toml. The library is optional: without a C++ compiler the install succeeds and PyTorch loops run.
"""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

CPU = Path("kernels/lowbit/cpu")
# Products and sums are fused only where a kernel says so; no -march: kernels choose their instructions when they run.
FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"]


class BuildLibrary(build_ext):
    """build_ext for a library that no Python imports: no init function, no Python version in its name."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def get_export_symbols(self, ext):
        return ext.export_symbols

    def build_extension(self, ext):
        """With OpenMP, which shares PyTorch's threads where both have libgomp; without, for compilers that lack it."""
        try:
            ext.extra_compile_args = ext.extra_link_args = [*FLAGS, "-fopenmp"]
            super().build_extension(ext)
        except (CompileError, LinkError):
            ext.extra_compile_args = ext.extra_link_args = FLAGS
            super().build_extension(ext)


native = Extension(
    "lowbit.cpu._native",
    sources=[str(path) for path in sorted(CPU.glob("*.cpp"))],
    depends=["setup.py", *(str(path) for path in sorted(CPU.glob("*.h")))],
    language="c++",
    optional=True,
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildLibrary})
