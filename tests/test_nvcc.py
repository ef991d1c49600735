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
    assert len(found) <= (10 if source.startswith("cafd") else 24), "more kernels than anybody will read"
    in_memory = [name for name, r in rows if r.in_memory > 0]
    assert not in_memory, f"a spill or a stack frame in {in_memory}"


# Thread instructions for a pixel in planes on sm_90, forward and gradient, and so much more at most. With kernels that
# staged every tile in shared memory it was 406 to 536 at K = 6, some 2,500 at 19 and 18,700 at 150.
INSTRUCTIONS = {
    False: {(6, "fp32"): 332, (6, "bf16"): 351, (19, "fp32"): 857, (19, "bf16"): 758,
            (150, "fp32"): 6401, (150, "bf16"): 5485},
    True: {(6, "fp32"): 424, (6, "bf16"): 440, (19, "fp32"): 975, (19, "bf16"): 883,
           (150, "fp32"): 6860, (150, "bf16"): 5939},
}  # fmt: skip
MORE = 1.05  # another release of the compiler


@pytest.mark.parametrize("ce", [False, True])
def test_tnkd_takes_no_more_instructions(ce: bool, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its nvdisasm reads the machine code")
    found = nvcc.instructions_per_pixel(90, tmp_path, ce)
    print(f"\nthread instructions a pixel, {'with' if ce else 'without'} cross-entropy: {found}")
    assert found.keys() == INSTRUCTIONS[ce].keys()
    for case, count in found.items():
        assert count <= INSTRUCTIONS[ce][case] * MORE, f"{case}: {count:.0f}"


def test_labels_take_few_instructions(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its nvdisasm reads the machine code")
    count = nvcc.instructions_per_label(90, tmp_path)
    print(f"\nthread instructions a label, all paths of the loop: {count}")
    assert 8 < count <= 34 * MORE


# The same of logits at a quarter of the labels' size, each way.
UPSAMPLED = {
    False: {(6, "fp32"): 455, (6, "bf16"): 462, (19, "fp32"): 830, (19, "bf16"): 847,
            (150, "fp32"): 6194, (150, "bf16"): 6346},
    True: {(6, "fp32"): 542, (6, "bf16"): 549, (19, "fp32"): 945, (19, "bf16"): 964,
           (150, "fp32"): 6646, (150, "bf16"): 6798},
}  # fmt: skip


@pytest.mark.parametrize("ce", [False, True])
def test_logits_smaller_than_the_labels_take_no_more_instructions(ce: bool, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="its nvdisasm reads the machine code")
    found = nvcc.upsampled_instructions_per_pixel(90, tmp_path, ce)
    print(f"\nthe same at a quarter of the labels' size, each way: {found}")
    assert found.keys() == UPSAMPLED[ce].keys()
    for case, count in found.items():
        assert count <= UPSAMPLED[ce][case] * MORE, f"{case}: {count:.0f}"
