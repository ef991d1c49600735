"""setup.py: what it builds, what it leaves out, and what it says, with nvccs that are stand-ins.

The builds are real, by the setup.py of the repository, in a folder whose kernels are empty files.
"""

import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dsct_kernels import __main__ as report
from dsct_kernels import backends
from tools.inspect.nvcc import FLAGS, NVCC

SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
ROOT = Path(__file__).resolve().parents[1]
CUDA_12_4 = "sm_50 sm_52 sm_53 sm_60 sm_61 sm_62 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_90a"
CUDA_12_8 = f"{CUDA_12_4} sm_100 sm_100a sm_101 sm_101a sm_120 sm_120a"
CUDA_13_0 = "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_110 sm_103 sm_120 sm_121"  # newest not last
REFUSES = "nvcc fatal   : Unsupported gpu architecture 'compute_120'"

spec = importlib.util.spec_from_file_location("dsct_kernels_setup", ROOT / "setup.py")
assert spec is not None and spec.loader is not None
setup_py = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_py)


def stand_in(home: Path, lists: str | None = CUDA_13_0, release: str = "13.0", compile: str | None = None) -> str:
    """An nvcc in home/bin, and beside it what a CUDA build of torch links. None: it fails at that, in its words."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    listing = "printf '%s\\n' " + lists if lists is not None else "echo 'nvcc fatal   : Unknown option' >&2; exit 1"
    nvcc.write_text(
        "#!/bin/sh\n"
        'echo "$@" >> "$0.log"\n'
        'case "$1" in\n'
        f"  --list-gpu-code) {listing} ; exit ;;\n"
        f"  --version) echo 'Cuda compilation tools, release {release}, V{release}.88' ; exit ;;\n"
        "esac\n" + (compile if compile is not None else f'echo "{REFUSES}" >&2; exit 1') + "\n"
    )
    nvcc.chmod(0o755)
    return str(nvcc)


# An nvcc that compiles whatever it is given to an object without anything in it.
COMPILES = 'while [ "$1" != -o ]; do shift; done; exec c++ -fPIC -x c++ -c /dev/null -o "$2"'


# --- which architectures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lists,archs",
    [
        (CUDA_12_4, "8.0;8.6;8.9;9.0+PTX"),
        (CUDA_12_8, "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        (CUDA_13_0, "8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("sm_70 sm_75 sm_80", "8.0+PTX"),
        ("sm_80 sm_90a sm_100a sm_120f", "8.0+PTX"),  # for one architecture only: no other runs that code
        ("sm_90 sm_100 sm_120 sm_130", "9.0;10.0;12.0+PTX"),  # the oldest are dropped some day
    ],
)
def test_the_default_architectures_are_those_that_nvcc_knows(lists, archs, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    stand_in(tmp_path, lists)
    assert setup_py.cuda_archs("13.0", str(tmp_path)) == archs
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    assert setup_py.cuda_archs("13.0", str(tmp_path)) == archs


@pytest.mark.parametrize("asked", ["9.0a", "8.6 12.0+PTX", "Hopper", "native", "5.2"])
def test_a_list_of_the_users_is_obeyed_as_it_is_given_and_nvcc_not_asked(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    nvcc = stand_in(tmp_path, None)
    assert setup_py.cuda_archs("13.0", str(tmp_path)) == asked
    assert not Path(nvcc + ".log").exists()


@pytest.mark.parametrize(
    "lists,said",
    [(None, "--list-gpu-code failed: nvcc fatal   : Unknown option"), ("sm_70 sm_75", "sm_70"), ("''", "")],
)
def test_an_nvcc_that_knows_nothing_of_use_is_named_with_its_words(lists, said, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc = stand_in(tmp_path, lists)
    with pytest.raises(setup_py.CannotBuild) as raised:
        setup_py.cuda_archs("13.0", str(tmp_path))
    assert nvcc in str(raised.value) and said in str(raised.value)
    assert "TORCH_CUDA_ARCH_LIST" in str(raised.value)


def test_an_nvcc_that_does_not_even_start_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    nvcc = Path(stand_in(tmp_path))
    nvcc.write_bytes(b"\x7fELF of another machine")
    with pytest.raises(setup_py.CannotBuild, match=r"nvcc --list-gpu-code failed: .*Exec format error"):
        setup_py.cuda_archs("13.0", str(tmp_path))


def test_without_torchs_cuda_or_without_an_nvcc_there_are_no_cuda_kernels(tmp_path):
    assert setup_py.cuda_archs("13.0", None) == setup_py.cuda_archs("13.0", str(tmp_path)) == ""
    stand_in(tmp_path)
    assert setup_py.cuda_archs(None, str(tmp_path)) == ""


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
def test_the_nvcc_of_this_machine_takes_its_default_architectures(tmp_path, monkeypatch):
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", setup_py.default_archs(NVCC))
    (tmp_path / "none.cu").write_text("__global__ void none() {}")
    command = [NVCC, *_get_cuda_arch_flags(), "-c", "none.cu", "-o", "none.o"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- whole builds ----------------------------------------------------------------------------------------------------

DRIVER = """
import os, runpy, sys
if os.environ.get("ISOLATED"):
    sys.modules["torch"] = None
else:
    import torch, torch.utils.cpp_extension
    torch.version.cuda = os.environ.get("STAND_IN_CUDA") or None
    torch.utils.cpp_extension.CUDA_HOME = os.environ.get("STAND_IN_HOME") or None
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""
LOOK = """
import importlib.util, json, sys, torch
spec = importlib.util.spec_from_file_location("dsct_kernels._C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps(module.build_info()))
"""


class Project:
    """The repository's setup.py and module.cpp with next to no kernels, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "project", folder / "cuda"
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/module.cpp", "csrc/common/cpu_isa.h"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        self.write("dsct_kernels/__init__.py")
        for name in ("ops.cpp", "ops_cuda.cpp", "none/cpu/none.cpp", "none/cuda/none.cu"):
            self.write(f"csrc/{name}")
        self.package = self.folder / "lib" / "dsct_kernels"

    def write(self, name: str, text: str = "") -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def build(self, *command: str, cuda: str = "13.0", **environment: str) -> subprocess.CompletedProcess[str]:
        command = command or (
            "build_py",
            "--build-lib",
            "lib",
            "build_ext",
            "--build-lib",
            "lib",
            "--build-temp",
            "tmp",
        )
        kept = {k: v for k, v in os.environ.items() if k not in ("TORCH_CUDA_ARCH_LIST", "DSCT_KERNELS_BUILD")}
        environment = {**kept, "STAND_IN_CUDA": cuda, "STAND_IN_HOME": str(self.home), **environment}
        return subprocess.run(
            [sys.executable, "-c", DRIVER, *command],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    def built(self, package: Path | None = None) -> list[Path]:
        return sorted((package or self.package).glob("_C*.so"))

    def info(self, package: Path | None = None) -> dict[str, str]:
        (module,) = self.built(package)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.home / "lib64")}
        done = subprocess.run([sys.executable, "-c", LOOK, module], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def note(self, package: Path | None = None) -> str | None:
        path = (package or self.package) / setup_py.NOTE
        return path.read_text() if path.exists() else None


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_a_cuda_build_that_fails_leaves_the_cpu_kernels_in_place_and_says_why(project):
    stand_in(project.home)
    in_place = project.folder / "dsct_kernels"
    project.write("dsct_kernels/_C" + importlib.machinery.EXTENSION_SUFFIXES[1], "the kernels of last week")
    done = project.build("build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in project.built(in_place)] == [f"_C{SUFFIX}"]  # and nothing that Python might prefer
    info = project.info(in_place)
    assert (info["cuda"], info["cuda_archs"], info["torch"]) == ("", "", torch.__version__)
    for told in (done.stderr, project.note(in_place)):
        assert "the build with CUDA failed" in told and REFUSES in told
    assert "WITHOUT the CUDA kernels" in done.stderr
    assert project.built(in_place)[0].stat().st_size < 2**20, "symbols and debug information are left in"

    assert project.build("build_ext", "--inplace", cuda="").returncode == 0
    assert project.note(in_place) is None, "the note of an earlier build stayed"


@pytest.mark.parametrize(
    "nvcc,said",
    [
        ({"release": "11.8"}, "The detected CUDA version"),  # of another major version than torch's: torch refuses
        ({"lists": None}, "--list-gpu-code failed: nvcc fatal   : Unknown option"),
        ({"compile": COMPILES}, "cudart"),  # compiles, but the CUDA libraries to link are not there
    ],
    ids=["another CUDA", "cannot list", "cannot link"],
)
def test_whatever_fails_about_cuda_the_cpu_kernels_are_installed(project, nvcc, said):
    stand_in(project.home, **nvcc)
    done = project.build()
    assert done.returncode == 0, done.stderr
    assert project.info()["cuda_archs"] == ""
    for told in (done.stderr, project.note()):
        assert said in told
    assert "WITHOUT the CUDA kernels" in done.stderr


@pytest.mark.parametrize("nvcc", [{}, {"lists": None}, {"lists": "sm_75"}], ids=["compile", "list", "too old"])
def test_a_native_build_fails_rather_than_leave_the_cuda_kernels_out(project, nvcc):
    stand_in(project.home, **nvcc)
    done = project.build(DSCT_KERNELS_BUILD="native")
    assert done.returncode != 0 and not project.built() and project.note() is None
    assert ("Unsupported gpu" if not nvcc else "cannot build the CUDA kernels") in done.stdout + done.stderr


def test_an_nvcc_that_works_is_asked_for_what_it_knows_and_the_build_says_so(project):
    nvcc = stand_in(project.home, CUDA_12_4, compile=COMPILES)
    (project.home / "lib64").mkdir()
    for name in ("cudart", "c10_cuda", "torch_cuda"):
        library = project.home / "lib64" / f"lib{name}.so"
        subprocess.run(["c++", "-shared", "-fPIC", "-x", "c++", "/dev/null", "-o", library], check=True)
    done = project.build(DSCT_KERNELS_BUILD="native", LDFLAGS=f"-L{project.home / 'lib64'}")
    assert done.returncode == 0, done.stderr
    asked = Path(nvcc + ".log").read_text()
    assert "code=sm_90" in asked and "code=compute_90" in asked and "_100" not in asked and "_120" not in asked
    info = project.info()
    assert (info["cuda"], info["cuda_archs"]) == ("13.0", "8.0;8.6;8.9;9.0+PTX")
    assert project.note() is None and "WITHOUT" not in done.stderr


def test_a_cpu_build_that_fails_fails_the_install_and_ends_with_the_cause(project):
    project.write("csrc/none/cpu/none.cpp", '#error "no such luck"\n')
    done = project.build(MAX_JOBS="1", cuda="")
    assert done.returncode != 0 and not project.built() and project.note() is None
    told = done.stderr.splitlines()[-1]
    assert "the build without CUDA failed" in told and "no such luck" in told and "DSCT_KERNELS_BUILD=python" in told


@pytest.mark.parametrize(
    "command,environment,cause",
    [
        ("bdist_wheel", {"ISOLATED": "1"}, "no torch in the environment of the build, which pip isolates"),
        ("editable_wheel", {"ISOLATED": "1"}, "no torch in the environment of the build, which pip isolates"),
        ("build_ext --inplace", {"CXX": "no-such-c++ -pthread"}, "no C++ compiler: 'no-such-c++' is not on the PATH"),
    ],
    ids=["isolated", "isolated and editable", "no compiler"],
)
def test_where_the_kernels_cannot_be_built_the_install_fails_and_says_in_one_line_what_to_type(
    project, command, environment, cause
):
    done = project.build(*command.split(), cuda="", **environment)
    assert done.returncode != 0 and not list(project.folder.rglob("*.whl"))
    told = done.stderr.splitlines()[-1]
    assert cause in told and backends.INSTALL in told and "DSCT_KERNELS_BUILD=python" in told


def test_an_sdist_can_be_had_without_torch(project):
    done = project.build("sdist", cuda="", ISOLATED="1")  # which builds nothing; pip asks for metadata likewise
    assert done.returncode == 0, done.stderr
    assert list((project.folder / "dist").glob("*.tar.gz"))


def test_a_wheel_is_for_one_python_and_holds_one_binary(project):
    done = project.build("bdist_wheel", cuda="")
    assert done.returncode == 0, done.stderr
    (wheel,) = (project.folder / "dist").iterdir()
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{python}-{python}-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as files:
        assert [name for name in files.namelist() if name.endswith(".so")] == [f"dsct_kernels/_C{SUFFIX}"]


def test_pure_python_has_to_be_asked_for_and_says_so_whenever_it_is_imported(project):
    shutil.copytree(Path(backends.__file__).parent, project.folder / "dsct_kernels", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.so", "__pycache__", setup_py.NOTE))  # fmt: skip
    asked = {"DSCT_KERNELS_BUILD": "python", "CXX": "no-such-compiler", "ISOLATED": "1"}
    done = project.build("build", "--build-base", "base", "--build-lib", "lib", cuda="", **asked)
    assert done.returncode == 0, done.stderr
    cause, command = "DSCT_KERNELS_BUILD=python was asked for", "pip install --no-build-isolation ."
    assert cause in done.stderr and command in done.stderr and "WITHOUT native kernels" in done.stderr
    # An editable install of this repository would find its own binary for a package that has none.
    script = (
        "import sys; sys.path.insert(0, 'lib')\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]\n"
        "import dsct_kernels; print(dsct_kernels.__file__)"
    )
    used = subprocess.run([sys.executable, "-c", script], cwd=project.folder, capture_output=True, text=True)
    assert str(Path("lib", "dsct_kernels")) in used.stdout, used.stderr
    assert "the native kernels are not built into this installation" in used.stderr
    assert cause in used.stderr and command in used.stderr


def test_what_the_build_left_out_is_said_wherever_the_backends_are_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(backends, "left_out", lambda: "the build with CUDA failed: nvcc fatal")
    assert str(backends._why_not_arch("", (9, 0))).endswith(
        "built without CUDA: the build with CUDA failed: nvcc fatal"
    )
    monkeypatch.setattr(backends, "NATIVE_MISSING", None)
    monkeypatch.setattr(backends, "build_info", lambda: {
        "compiler": "gcc", "torch": "2.13.0", "cuda": "", "cuda_archs": "", "cpu_isas": ("",), "cpu_isa": ""
    })  # fmt: skip
    report.main([])
    assert "no CUDA (the build with CUDA failed: nvcc fatal)" in capsys.readouterr().out
    monkeypatch.setattr(backends, "left_out", lambda: None)
    assert "reinstall where torch has CUDA" in str(backends._why_not_arch("", (9, 0)))


def test_the_tests_compile_the_cuda_sources_with_the_flags_of_the_build():
    assert FLAGS == setup_py.NVCC_FLAGS


def test_the_command_that_is_named_is_one_and_the_same_everywhere():
    assert setup_py.INSTALL == backends.INSTALL
    readme = (ROOT / "README.md").read_text()
    assert f"\n{backends.INSTALL}\n" in readme
