// The TNKD kernels for any machine; see common/vec.h.
#include "common/vec.h"
//
#include "kernel.h"
