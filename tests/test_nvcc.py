"""The CUDA kernels compiled with nvcc where there is one: a spill or a stack frame fails.

Then an array that was meant for registers has gone to memory. `pytest tests/test_nvcc.py -s` prints the table.
"""

from pathlib import Path

import pytest

from tools.inspect import nvcc

pytestmark = pytest.mark.skipif(nvcc.NVCC is None, reason="no nvcc on the PATH")


@pytest.mark.parametrize("source", nvcc.SOURCES)
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_kernels_stay_in_registers(source: str, arch: int, tmp_path: Path) -> None:
    found = nvcc.resources(source, arch, tmp_path)
    rows = sorted(zip(nvcc.demangled(list(found)), found.values(), strict=True), key=lambda row: row[0])
    print(f"\n{source} on sm_{arch}: registers, stack frame, spill stores, spill loads, static shared memory (bytes)")
    for name, r in rows:
        print(f"  {r.registers:4d} {r.stack:4d} {r.spill_stores:4d} {r.spill_loads:4d} {r.shared:6d}  {name}")
    in_memory = [name for name, r in rows if r.in_memory > 0]
    assert not in_memory, f"a spill or a stack frame in {in_memory}"
