// The TNKD kernels for avx2; see common/vec.h.
#if defined(__x86_64__)
#define DSCT_ISA_AVX2
#include "common/vec.h"
//
#include "kernel.h"
//
#include "common/vec_end.h"
#endif
