// The module's table of contents. pybind11 is seen in this folder only: view, check, call. The module loads without
// torch.
#include <sys/mman.h>

#include <string>
#include <vector>

#include "bindings/bind.h"
#include "bindings/views.h"
#include "kernels.h"
#include "ops/devices.h"
#include "python/backward_hook.h"
#include "python/parallel.h"
#include "python/tensor_view.h"
#include "python/training_pass.h"

namespace lipcore {
namespace {

// Large state is read once per step from end to end: huge pages save most of the page walks.
void advise_huge_pages(py::handle tensor) {
  const TensorView view = view_of(tensor, "tensor", Access::kWrite);
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(view.data) + kPage - 1) / kPage * kPage;
  const uintptr_t end =
      reinterpret_cast<uintptr_t>(view.data) + static_cast<uintptr_t>(view.numel * item_size(view.dtype));
  if (view.on_cpu() && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

void register_types(py::handle tensor, py::handle parameter, py::handle refuse, py::handle accepts) {
  check(register_torch(tensor.ptr(), parameter.ptr(), refuse.ptr(), accepts.ptr()));
}

void register_passes(const std::vector<py::object>& torch) {
  if (torch.size() != kTorchPasses) throw py::value_error("torch: expected one object per member of TorchPasses");
  TorchPasses passes;
  for (size_t i = 0; i < torch.size(); ++i) reinterpret_cast<PyObject**>(&passes)[i] = torch[i].ptr();
  register_torch_passes(passes);
}

void use_isa(const std::string& name) {
  if (const char* message = select_isa(name.c_str())) throw py::value_error(message);
}

}  // namespace
}  // namespace lipcore

PYBIND11_MODULE(_core, m) {
  using namespace lipcore;
  m.doc() = "Compiled core of lipcore.";
  if (const char* message = select_isa_from_environment()) throw py::import_error(message);
  m.def("register_torch", &register_types, py::arg("tensor"), py::arg("parameter"), py::arg("refuse"),
        py::arg("accepts"));
  m.def("use_torch_threads", [](const std::string& path) { return use_torch_threads(path.c_str()); }, py::arg("path"));
  m.def("pool_size", &pool_size);
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("float16_to_float", &float16_to_float, py::arg("bits"));
  m.def("advise_huge_pages", &advise_huge_pages, py::arg("tensor"));
  m.def("register_passes", &register_passes, py::arg("torch"));
  py::object hook = py::reinterpret_steal<py::object>(make_backward_hook_type());
  check(hook.ptr() != nullptr);
  m.attr("BackwardHook") = hook;
  m.def("pause", &pause_recording, py::arg("by"));
  m.def("paused", &is_paused);
  bind_hot_functions(m);
  bind_distribution(m);
  bind_tensor_stats(m);
  bind_trajectory(m);
  bind_per_sample(m);
  bind_single_sample(m);
  bind_single_batch(m);
  m.attr("cuda_built") = cuda_built();
  m.def("cuda_device_count", &cuda_device_count);
  m.def("cuda_versions", &cuda_versions);
  m.def("cuda_trouble", &cuda_trouble);
  m.def("cuda_trouble_on", &cuda_trouble_on, py::arg("device"));
  m.def(
      "cuda_multiplies_16_bit",
      [](int device) {
        bool does = false;
        check(cuda_multiplies_16_bit(device, &does));
        return does;
      },
      py::arg("device"));
}
