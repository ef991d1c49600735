"""`python -m dsct_kernels`: what was built, what is usable on this machine, and why the rest is not."""

import os
import platform

import torch

from . import __version__, backends
from .cafd import matched_native
from .cafd import native as cafd_native
from .cafd import reference as cafd_reference
from .cafd import triton as cafd_triton
from .jaccard import native as jaccard_native
from .jaccard import reference as jaccard_reference
from .tnkd import native as tnkd_native
from .tnkd import reference as tnkd_reference
from .tnkd import triton as tnkd_triton

LOSSES = {
    "tnkd": (tnkd_reference, tnkd_native, tnkd_triton),
    "cafd": (cafd_reference, cafd_native, cafd_triton),
    "matched": (cafd_reference, matched_native, None),  # matched CAFD
    "jaccard": (jaccard_reference, jaccard_native, None),
}


def devices() -> list[tuple[torch.device, str]]:
    """Every device of this machine that a backend may serve, with its name."""
    found = [(torch.device("cpu"), platform.processor() or platform.machine())]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append((torch.device("cuda", i), f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    return found


def main() -> None:
    print(f"dsct_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    if backends.NATIVE_MISSING is None:
        info = backends.build_info()
        why = f" ({backends.left_out()})" if backends.left_out() else ""
        cuda = f"CUDA {info['cuda']} for {info['cuda_archs']}" if info["cuda_archs"] else f"no CUDA{why}"
        print(f"native build: {info['compiler']}, torch {info['torch']}, {cuda}")
        print(f"  CPU instruction sets built in: {', '.join(info['cpu_isas'])}; in use: {info['cpu_isa']}")  # type: ignore[arg-type]
    else:
        print(f"native build: none: {backends.NATIVE_MISSING}")
    if os.environ.get("DSCT_KERNELS_BACKEND"):
        print(f'DSCT_KERNELS_BACKEND={os.environ["DSCT_KERNELS_BACKEND"]} is what "auto" stands for')
    for device, name in devices():
        print(f"\n{device} ({name})")
        for loss, modules in LOSSES.items():
            x = torch.zeros((1, 2, 1, 1), device=device)
            try:
                chosen, refusal = backends.choose("auto", *modules, x), None
            except (RuntimeError, ValueError) as error:  # DSCT_KERNELS_BACKEND cannot serve, or names no backend
                chosen, refusal = None, error
            for module in filter(None, modules):
                backend = module.__name__.rpartition(".")[2].removeprefix("matched_")
                reason = module.why_not(x)
                state = "usable" if reason is None else f"not usable: {reason}"
                print(f"  {loss:7} {backend:10} {state}{', chosen by auto' if module is chosen else ''}")
            if refusal is not None:
                print(f"  {loss:7} {'auto':10} raises: {refusal}")
    print(
        "\nTriton compiles on the first call with a new combination of dtypes, layouts, classes or channels, or image "
        "size (another batch compiles nothing where H x W is a multiple of 128): at most "
        f"{tnkd_triton.MOST_COMPILED} kernels for tnkd, {cafd_triton.MOST_COMPILED} for each stage of cafd; "
        "later calls and processes find them in its cache"
    )


if __name__ == "__main__":
    main()
