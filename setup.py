"""Builds csrc/ into dsct_kernels._C where a compiler and torch are at hand; installs as pure Python, loudly, where not.

DSCT_KERNELS_BUILD=python   skip the build       DSCT_KERNELS_BUILD=native   fail rather than fall back
TORCH_CUDA_ARCH_LIST        as everywhere in torch; default sm_80 to sm_120, PTX for the newest
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
BUILD = os.environ.get("DSCT_KERNELS_BUILD", "auto")
if BUILD not in ("auto", "python", "native"):
    raise SystemExit(f"DSCT_KERNELS_BUILD={BUILD!r}: expected 'auto', 'python' or 'native'")

CPU_SOURCES = ["csrc/ops.cpp", "csrc/module.cpp", *sorted(str(p) for p in Path("csrc").glob("*/*_cpu*.cpp"))]
CUDA_SOURCES = ["csrc/ops_cuda.cpp", *sorted(str(p) for p in Path("csrc").glob("*/*_cuda.cu"))]
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # libtorch's stable ABI as of 2.10: one build for every later torch
CXX_FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-math-errno", ABI]
# Division within 2 ulp: the exact one branches, and TNKD makes six a pixel.
NVCC_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--prec-div=false", ABI]


def say(message: str) -> None:
    bar = "*" * 100
    print(f"\n{bar}\n* dsct_kernels: {message}\n{bar}\n", file=sys.stderr, flush=True)


def native_extension():
    """The extension and its build command, or the reason why there is none."""
    if BUILD == "python":
        return "DSCT_KERNELS_BUILD=python was asked for"
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        return f"{error} (install torch and pybind11 first, and build with --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on the PATH"
    # Whether a GPU is visible says nothing about where the package will run: a CUDA torch and an nvcc decide.
    cuda = bool(torch.version.cuda and CUDA_HOME and shutil.which(os.path.join(CUDA_HOME, "bin", "nvcc")))
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    macros = [
        ("DSCT_TORCH_VERSION", f'"{torch.__version__}"'),
        ("DSCT_CUDA_VERSION", f'"{torch.version.cuda if cuda else ""}"'),
        ("DSCT_CUDA_ARCHS", f'"{os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else ""}"'),
    ]
    extension = (CUDAExtension if cuda else CppExtension)(
        "dsct_kernels._C",
        CPU_SOURCES + (CUDA_SOURCES if cuda else []),
        include_dirs=[str(HERE / "csrc"), pybind11.get_include()],
        define_macros=macros + ([("USE_CUDA", None)] if cuda else []),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD == "native":
                    raise
                say(f"the native build FAILED, installing as pure Python (slow reference only): {error}")
                self.extensions = []

    return extension, Build.with_options(use_ninja=True)


built = native_extension()
if isinstance(built, str):
    if BUILD == "native":
        raise SystemExit(f"dsct_kernels: cannot build the native kernels: {built}")
    say(f"installing WITHOUT native kernels, the slow pure-PyTorch reference serves every call: {built}")
    setup()
else:
    setup(ext_modules=[built[0]], cmdclass={"build_ext": built[1]})
