"""The native CPU kernels with the instruction sets that this run does not use.

Half of the tests of numbers again, in one process for each set where this machine has it.
"""

import pytest

from dsct_kernels import backends
from tests.helpers import ISAS, run_again_with

CHOSEN = {
    "tests/cafd/test_matched.py": "shapes or temperatures or magnitudes or Infinities or block or mask or ignored or "
    "silent or any_maps",
    "tests/cafd/test_native.py": "shapes or temperatures or magnitudes or nan or zero or one_hot or upstream or "
    "equal_networks",
    "tests/jaccard/test_jaccard.py": "formula or shapes or classes or magnitudes or streaming or count or nan or "
    "absent or equal or property",
    "tests/tnkd/test_absent_classes.py": "native",
    "tests/tnkd/test_kd.py": "shapes or low_resolution or magnitudes or digits or (absent and native)",
    "tests/tnkd/test_low_resolution.py": "sizes or ignored or nan or absent or bits or any or alone or map",
    "tests/tnkd/test_native.py": "shapes or temperature or magnitudes or ignored or nan or absent or streaming or "
    "argmax or strides or alone",
}


@pytest.mark.skipif(backends.NATIVE_MISSING is not None, reason=str(backends.NATIVE_MISSING))
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    run_again_with(isa, CHOSEN)
