#include "trajectory/trajectory_plan.h"

#include "python/parallel.h"
#if defined(LIPCORE_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace lipcore {

TrajectoryPlan::~TrajectoryPlan() {
  for (TrajectoryCopies& copies : copies_)
    for (PyObject* object : {copies.prev, copies.deviation, copies.m2}) Py_XDECREF(object);
}

bool TrajectoryPlan::capture(std::vector<ParameterEntry> entries, std::vector<TrajectoryCopies> copies,
                             Ledger* ledger) {
  parameters_.capture(std::move(entries), ledger->device());
  copies_ = std::move(copies);
  ledger_ = ledger;
  const size_t n = parameters_.size();
  items_.assign(n, {});
  sums_.assign(n, {});
  if (static_cast<int64_t>(n) != ledger->tables().tensors)
    return fail({"entries"}, "expected %lld, one per tensor of the ledger, got %zu",
                static_cast<long long>(ledger->tables().tensors), n);
  if (!look_up_all()) return false;
  if (!ledger->on_cpu()) {
#if defined(LIPCORE_WITH_CUDA)
    moved_ = false;  // the tables get the pointers as they are now
    cuda_runner_ = std::make_shared<cuda::StepRunner>();
    return cuda_runner_->plan(items_, ledger->device(), ledger->tables());
#else
    return fail({"ledger"},
                "is on a CUDA device, but this lipcore was built without CUDA; rebuild with LIPCORE_CUDA=ON "
                "or keep the model on the CPU");
#endif
  }
  std::vector<int64_t> counts;
  for (const TrajectoryItem& item : items_) counts.push_back(item.count);
  runner_.plan(counts);
  return true;
}

// The slow look, taken at capture and whenever the pointer has changed.
bool TrajectoryPlan::admit(size_t i, const TensorView& view) {
  TensorView prev, deviation, m2{};
  if (!view_tensor(copies_[i].prev, {"prev"}, Access::kWrite, &prev) ||
      !view_tensor(copies_[i].deviation, {"deviation"}, Access::kWrite, &deviation))
    return false;
  const bool elements = copies_[i].m2 != Py_None;
  if (elements && !view_tensor(copies_[i].m2, {"m2"}, Access::kWrite, &m2)) return false;
  const DType wide = view.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto fits = [&](const TensorView& state) {
    return state.dtype == wide && state.numel == view.numel && state.same_device(view);
  };
  const uint64_t geometry = geometry_of(view);
  if (geometry_of(prev) != geometry || !fits(deviation) || (elements && !fits(m2)))
    return parameters_.refuse(i, "does not match its state's shape, dtype, device or memory layout");
  const TrajectoryItem item{view.data, prev.data, deviation.data, m2.data, view.numel, view.dtype, true, 0.5};
  moved_ = moved_ || item.w != items_[i].w || item.w_prev != items_[i].w_prev ||
           item.deviation != items_[i].deviation || item.m2 != items_[i].m2;
  items_[i] = item;
  parameters_.accept(i, view);
  return true;
}

bool TrajectoryPlan::look_up_all() {
  parameters_.begin();
  for (size_t i = 0; i < parameters_.size(); ++i) {
    TensorView view;
    const auto look = parameters_.look_up(i, &view);
    if (look == ParameterList::Look::kError || (look == ParameterList::Look::kNew && !admit(i, view))) return false;
  }
  return true;
}

bool TrajectoryPlan::step(MovementCheck* check) {
  if (!look_up_all()) return false;
  if (check && !(ledger_->on_cpu() && check->fits(runner_.counts())))
    return fail({"check"}, "has taken no step of these parameters; call take() before every step, on the CPU");
  if (ledger_->on_cpu())
    step_on_cpu(check);
  else if (!step_on_device())
    return false;
  if (check) check->drop();
  ++block;
  return true;
}

bool TrajectoryPlan::step_on_device() {
#if defined(LIPCORE_WITH_CUDA)
  if (!cuda_runner_->step(items_, moved_)) return false;
  captured = cuda_runner_->captured();
  moved_ = false;
#endif
  return true;
}

void TrajectoryPlan::step_on_cpu(MovementCheck* check) {
  for (size_t i = 0; i < items_.size(); ++i) {
    items_[i].restart = starts_block(ledger_->row(i));
    items_[i].share = share_before(points_after_step(ledger_->row(i)));
  }
  const auto run = [this, check] {
    if (check)
      runner_.run(items_.data(), sums_.data(), check->items(), &update_sums_);
    else
      runner_.run(items_.data(), sums_.data());
  };
  if (runner_.total() >= kSerialElements)
    parameters_.without_gil(run);
  else
    run();
  if (check) check->write(update_sums_, static_cast<int64_t>(*ledger_->tables().cursor));
  ledger_->observe(sums_.data());
}

}  // namespace lipcore
