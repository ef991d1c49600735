// The Python module dsct_kernels._C: loading it registers the ops; it carries build_info() and nothing else.
#include <pybind11/pybind11.h>

#include "common/cpu_isa.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "unknown";
#endif
#ifdef DSCT_X86_ISAS
  info["cpu_isas"] = py::make_tuple("default", "avx2", "avx512");
#else
  info["cpu_isas"] = py::make_tuple("default");
#endif
  info["cpu_isa"] = dsct::cpu_isa_name(dsct::cpu_isa());
  info["cuda_archs"] = DSCT_CUDA_ARCHS;  // "" when built without CUDA
  info["cuda"] = DSCT_CUDA_VERSION;
  info["torch"] = DSCT_TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of dsct_kernels; importing it registers torch.ops.dsct_kernels.*";
  m.def("build_info", &build_info,
        "Compiler, instruction sets built in and in use, CUDA architectures, torch version.");
}
