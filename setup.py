"""Builds csrc/ into dsct_kernels._C: the CPU kernels, and the CUDA kernels where torch has CUDA and an nvcc is found.

One binary serves every torch from 2.10 on (libtorch's stable ABI); there is one for each Python (pybind11).

DSCT_KERNELS_BUILD=auto     the default: without the CPU kernels the build fails, in one line; CUDA kernels that cannot
                            be built are left out, loudly
DSCT_KERNELS_BUILD=native   the CUDA kernels are not left out either where torch has CUDA and an nvcc is found
DSCT_KERNELS_BUILD=python   build nothing: the reference, in plain PyTorch, serves every call
DSCT_KERNELS_DEBUG=1        keep symbols and debug information, ten times the size
TORCH_CUDA_ARCH_LIST        as everywhere in torch, obeyed as it is given; default: those of CUDA_ARCHS that nvcc knows
"""

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
CPU_SOURCES = ("ops.cpp", "module.cpp", "*/cpu/*.cpp")
CUDA_SOURCES = ("ops_cuda.cpp", "*/cuda/*.cu")
CUDA_ARCHS = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # libtorch's stable ABI as of 2.10: one build for every later torch
CXX_FLAGS = ["-std=c++20", "-O3", "-fvisibility=hidden", "-fno-math-errno", ABI]
# Division within 2 ulp: the exact one branches, and TNKD makes six a pixel.
NVCC_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr", "--prec-div=false", ABI]
NOTE = "_left_out.txt"  # pip hides what a build prints: dsct_kernels/backends.py finds the reason here, and says it
INSTALL = 'pip install torch pybind11 ninja "setuptools>=77" && pip install --no-build-isolation .'
PURE = "DSCT_KERNELS_BUILD=python installs the reference alone, in plain PyTorch, many times slower"


class CannotBuild(Exception):
    """Why something is left out, in one line."""


def say(message: str) -> None:
    bar = "*" * 100
    print(f"\n{bar}\n* dsct_kernels: {message}\n{bar}\n", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------- what can be built here


def require_compiler() -> None:
    """Raises CannotBuild where the CPU kernels cannot be built, with the reason."""
    for module in ("torch", "pybind11"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise CannotBuild(
                f"no {module} in the environment of the build, which pip isolates from what is installed unless it is "
                f"told not to: {error}"
            ) from error
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise CannotBuild(f"no C++ compiler: {compiler!r} is not on the PATH")


def default_archs(nvcc: str) -> str:
    """Those of CUDA_ARCHS that this nvcc knows, the newest with PTX for GPUs to come: a TORCH_CUDA_ARCH_LIST."""
    by_hand = "TORCH_CUDA_ARCH_LIST names architectures by hand"
    try:
        done = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise CannotBuild(f"{nvcc} --list-gpu-code failed: {words[-1] if words else error}; {by_hand}") from error
    known = set(re.findall(r"\bsm_(\d+)\b", done.stdout))
    archs = [arch for arch in CUDA_ARCHS if arch.replace(".", "") in known]
    if not archs:
        raise CannotBuild(
            f"{nvcc} knows none of {', '.join(CUDA_ARCHS)} (it lists {done.stdout.split() or 'nothing'}); {by_hand}"
        )
    return ";".join(archs) + "+PTX"


def cuda_archs(cuda: str | None, home: str | None) -> str:
    """The architectures to build for with torch's CUDA (`torch.version.cuda`, `cpp_extension.CUDA_HOME`), "" for none.

    Whether a GPU is visible says nothing about where the package will run: a CUDA torch and an nvcc decide.
    """
    nvcc = os.path.join(home, "bin", "nvcc") if home else None
    if not cuda or nvcc is None or shutil.which(nvcc) is None:
        return ""
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or default_archs(nvcc)


def extension(archs: str) -> Extension:
    """dsct_kernels._C, with CUDA kernels for `archs` or without any."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    debug = bool(os.environ.get("DSCT_KERNELS_DEBUG"))
    strip = sys.platform == "linux" and not debug
    macros = [
        ("DSCT_TORCH_VERSION", f'"{torch.__version__}"'),
        ("DSCT_CUDA_VERSION", f'"{torch.version.cuda if archs else ""}"'),
        ("DSCT_CUDA_ARCHS", f'"{archs}"'),
    ]
    patterns = CPU_SOURCES + (CUDA_SOURCES if archs else ())
    return (CUDAExtension if archs else CppExtension)(
        "dsct_kernels._C",
        sorted(os.path.relpath(p, HERE) for pattern in patterns for p in (HERE / "csrc").glob(pattern)),
        include_dirs=[str(HERE / "csrc"), str(HERE), pybind11.get_include()],
        define_macros=macros + ([("USE_CUDA", None)] if archs else []),
        extra_compile_args={"cxx": CXX_FLAGS + ([] if debug else ["-g0"]), "nvcc": NVCC_FLAGS},
        extra_link_args=["-Wl,--strip-all"] if strip else [],
    )


# ------------------------------------------------------------------------------------------------------- the commands


@contextlib.contextmanager
def overheard() -> Iterator[list[str]]:
    """The lines that this process and its children write to stdout and stderr, while they go where they always do."""
    lines: list[str] = []

    def pass_on(source: int, out: int) -> None:
        with os.fdopen(source, errors="replace") as pipe:
            for line in pipe:
                lines.append(line)
                os.write(out, line.encode(errors="replace"))

    taps = []
    for stream, fd in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        out = os.dup(fd)
        source, sink = os.pipe()
        os.dup2(sink, fd)
        os.close(sink)
        thread = threading.Thread(target=pass_on, args=(source, out), daemon=True)
        thread.start()
        taps.append((stream, fd, out, thread))
    try:
        yield lines
    finally:
        for stream, fd, out, thread in taps:
            stream.flush()
            os.dup2(out, fd)
            thread.join(timeout=5)  # a compiler's cache server may have inherited the pipe, and never close it


def cause(error: Exception, lines: list[str]) -> str:
    """What went wrong, with the compiler's first word about it: torch's error says no more than that it failed."""
    said = next((line.strip() for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)), "")
    return " ".join([*map(str, error.args), *([f"({said})"] if said else [])]) or repr(error)


def leave_note(command: Any, why: str | None) -> None:
    """Writes why something is left out, beside the modules that are installed; with None, removes an older note."""
    in_place = command.editable_mode or getattr(command, "inplace", False)
    note = (HERE if in_place else Path(command.build_lib)) / "dsct_kernels" / NOTE
    if why is None:
        note.unlink(missing_ok=True)
    else:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(why + "\n")


def pure_python(why: str) -> dict[str, type]:
    """The commands of a build that was asked to leave everything out."""

    class Build(build_py):
        def run(self) -> None:
            super().run()
            leave_note(self, why)

    return {"build_py": Build}


def refused(why: str) -> dict[str, type]:
    """The commands of a build that cannot be: whatever builds fails, while an sdist and metadata can still be had."""

    class BuildPy(build_py):
        def run(self) -> None:
            raise SystemExit(why)

    class BuildExt(build_ext):
        def run(self) -> None:
            raise SystemExit(why)

    return {"build_py": BuildPy, "build_ext": BuildExt}


def native(archs: str, why_no_cuda: str | None, cuda_may_be_left_out: bool) -> dict[str, type]:
    """build_ext that tries the CUDA kernels if `archs`, and the CPU kernels without them."""
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        def run(self) -> None:
            why = why_no_cuda
            attempts = [archs, ""] if archs and cuda_may_be_left_out else [archs]
            for attempt in attempts:
                before = dict(vars(self))
                try:
                    with overheard() as lines:
                        super().run()
                except Exception as error:
                    why = f"the build {'with' if attempt else 'without'} CUDA failed: {cause(error, lines)}"
                    if attempt == attempts[-1]:
                        raise SystemExit(f"dsct_kernels: {why}; {PURE}") from error
                    say(f"{why}; now WITHOUT the CUDA kernels, for the CPU alone")
                    vars(self).update(before)  # a build that failed half way has changed the command
                    vars(self.extensions[0]).update(vars(extension("")))  # setuptools has its notes on this object
                else:
                    break
            leave_note(self, why)
            for other in self.others():
                other.unlink()

        def others(self) -> list[Path]:
            """Binaries that an earlier build left beside the new one, by a name that Python may prefer."""
            (name,) = (self.get_ext_filename(self.get_ext_fullname(built.name)) for built in self.extensions)
            folders = [Path(self.build_lib, name).parent]
            if self.editable_mode or self.inplace:
                folders.append(HERE / Path(name).parent)
            return [p for folder in folders for p in folder.glob("_C.*.so") if p.name != Path(name).name]

    return {"build_ext": Build.with_options(use_ninja=True)}


def main() -> None:
    build = os.environ.get("DSCT_KERNELS_BUILD", "auto")
    if build not in ("auto", "python", "native"):
        raise SystemExit(f"DSCT_KERNELS_BUILD={build!r}: expected 'auto', 'python' or 'native'")
    if build == "python":
        why = "DSCT_KERNELS_BUILD=python was asked for"
        say(f"installing WITHOUT native kernels: {why}; for the kernels: {INSTALL}")
        setup(cmdclass=pure_python(why))
        return
    try:
        require_compiler()
    except CannotBuild as why:
        setup(cmdclass=refused(f"dsct_kernels: cannot build the native kernels: {why}; type: {INSTALL} ({PURE})"))
        return

    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    why_no_cuda = None
    try:
        archs = cuda_archs(torch.version.cuda, CUDA_HOME)
        if torch.version.cuda and not archs:
            why_no_cuda = f"torch has CUDA {torch.version.cuda}, but no nvcc was found (CUDA_HOME is {CUDA_HOME})"
    except CannotBuild as why:
        if build == "native":
            setup(cmdclass=refused(f"dsct_kernels: cannot build the CUDA kernels: {why}"))
            return
        archs, why_no_cuda = "", str(why)
    if why_no_cuda is not None:
        say(f"building WITHOUT the CUDA kernels, for the CPU alone: {why_no_cuda}")
    if archs:
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    setup(
        ext_modules=[extension(archs)],
        cmdclass=native(archs, why_no_cuda, cuda_may_be_left_out=build == "auto"),
    )


if __name__ == "__main__":
    main()
