"""`python -m dsct_kernels`: what was built, what is usable on this machine, and why the rest is not.

`python -m dsct_kernels --check`: whether what is usable computes the right numbers here, in ten seconds or so.
"""

import argparse
import os
import platform
import sys

import torch

from . import __version__, backends
from .backends import Backend
from .cafd import matched_triton
from .cafd import triton as cafd_triton
from .cafd.loss import BACKENDS as CAFD
from .cafd.matched import BACKENDS as MATCHED
from .jaccard import triton as jaccard_triton
from .jaccard.loss import BACKENDS as JACCARD
from .tnkd import triton as tnkd_triton
from .tnkd.loss import BACKENDS as TNKD
from .tnkd.loss import TNKDBackend

LOSSES: dict[str, tuple[Backend, ...]] = {
    "tnkd": TNKD,  # and cross-entropy
    "kd": TNKD,  # the same kernels
    "cafd": CAFD,
    "matched": MATCHED,  # matched CAFD
    "jaccard": JACCARD,
}


def how(backend: Backend, device: str) -> str:
    """What a usable backend makes of a call on this type of device."""
    if backend.name == "reference":
        return "plain PyTorch, not fused"
    if not isinstance(backend, TNKDBackend):
        return "fused"
    limited = backend.most_classes and device != "cpu"
    fused = f"fused up to {backend.most_classes} classes" if limited else "fused"
    if device in backend.upsamples_on:
        return f"{fused}, and so are logits smaller than the labels"
    return f"{fused}; logits smaller than the labels are upsampled beforehand"


def cpu_model() -> str:
    """The CPU's name, as its maker spells it."""
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def devices() -> list[tuple[torch.device, str]]:
    """Every device of this machine that a backend may serve, with its name."""
    found = [(torch.device("cpu"), cpu_model())]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append((torch.device("cuda", i), f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    return found


def versions() -> None:
    print(f"dsct_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if backends.NATIVE_MISSING is None:
        info = backends.build_info()
        why = f" ({backends.left_out()})" if backends.left_out() else ""
        cuda = f"CUDA {info['cuda']} for {info['cuda_archs']}" if info["cuda_archs"] else f"no CUDA{why}"
        print(f"native build: {info['compiler']}, torch {info['torch']}, {cuda}")
        print(f"  CPU instruction sets built in: {', '.join(info['cpu_isas'])}; in use: {info['cpu_isa']}")  # type: ignore[arg-type]
    else:
        print(f"native build: none: {backends.NATIVE_MISSING}")


def usable() -> None:
    if os.environ.get("DSCT_KERNELS_BACKEND"):
        print(f'DSCT_KERNELS_BACKEND={os.environ["DSCT_KERNELS_BACKEND"]} is what "auto" stands for')
    for device, name in devices():
        print(f"\n{device} ({name})")
        for loss, offered in LOSSES.items():
            x = torch.zeros((1, 2, 1, 1), device=device)
            chosen: Backend | None = None
            refusal: Exception | None = None
            try:
                chosen = backends.choose("auto", offered, x)
            except (RuntimeError, ValueError) as error:  # DSCT_KERNELS_BACKEND cannot serve, or names no backend
                refusal = error
            for backend in offered:
                reason = backend.why_not(x)
                by_auto = ", chosen by auto" if backend is chosen else ""
                state = f"usable{by_auto}: {how(backend, device.type)}" if reason is None else f"not usable: {reason}"
                print(f"  {loss:7} {backend.name:10} {state}")
            if refusal is not None:
                print(f"  {loss:7} {'auto':10} raises: {refusal}")
    print(
        "\nTriton compiles on the first call with a new combination of dtypes, layouts, classes or channels, or image "
        "size (another batch compiles nothing where H x W is a multiple of 128): at most "
        f"{tnkd_triton.MOST_COMPILED} kernels for tnkd, {cafd_triton.MOST_COMPILED} for each stage of cafd, "
        f"{matched_triton.MOST_COMPILED} for matched, {jaccard_triton.MOST_COMPILED} for jaccard; "
        "later calls and processes find them in its cache"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dsct_kernels", description="What is usable here, and why not.")
    parser.add_argument("--check", action="store_true", help="hold every usable kernel against the reference: seconds")
    options = parser.parse_args(arguments)
    versions()
    if not options.check:
        usable()
        return 0
    from .selftest import check

    here = devices()
    for device, name in here:
        print(f"{device}: {name}")
    return 0 if check([device for device, _ in here]) else 1


if __name__ == "__main__":
    sys.exit(main())
