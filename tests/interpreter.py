"""Where Triton's interpreter computes bfloat16 otherwise than a GPU does, it is put right: the tests need the GPU's."""

import numpy as np


def compute_bfloat16_as_a_gpu_does() -> None:
    """float32 to bfloat16 rounds to nearest even (was: cut off); float64 from and to it converts (was: the bits)."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(data, input_dtype, output_dtype, rounding_mode):  # type: ignore[no-untyped-def]
        if input_dtype != tl.float32 or output_dtype != tl.bfloat16:
            return convert(data, input_dtype, output_dtype, rounding_mode)
        bits = np.ascontiguousarray(data).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(data), np.uint16(0x7FC0), nearest)

    def through_float32(self, source, to):  # type: ignore[no-untyped-def]
        if {source.dtype.scalar, to.scalar} == {tl.bfloat16, tl.float64}:
            source = cast(self, source, tl.float32)
        return cast(self, source, to)

    interpreter._convert_float = rounding
    interpreter.InterpreterBuilder.cast_impl = through_float32
