// The TNKD kernels for any machine; see common/vec.h.
#include "../common/vec.h"
//
#include "tnkd_cpu_kernel.h"
