"""Triton's interpreter cuts float32 off at bfloat16 where a GPU rounds to nearest even: tests need the latter."""

import numpy as np


def round_to_nearest() -> None:
    """Makes the interpreter's conversion from float32 to bfloat16 round to nearest even."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, input_dtype, output_dtype, rounding_mode):  # type: ignore[no-untyped-def]
        if input_dtype != tl.float32 or output_dtype != tl.bfloat16:
            return convert(data, input_dtype, output_dtype, rounding_mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), nearest)

    interpreter._convert_float = rounding
