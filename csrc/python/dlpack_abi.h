// The few structs of the DLPack 1.x C ABI that lipcore reads, declared here so that building needs neither torch nor
// dlpack.h. The layout is frozen by the DLPack specification; the asserts below hold on every 64-bit platform.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lipcore::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr const char* kTypeAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

// Borrowed: shape and strides (in elements) belong to the producer and live as long as its tensor does.
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

// Owned by whoever holds it, who ends it by calling deleter.
struct ManagedTensor {
  Version version;
  void* manager_context;
  void (*deleter)(ManagedTensor* self);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  Version version;
  const ExchangeApi* previous;  // older table for consumers of an older major version, or null
  int (*managed_tensor_allocator)(Tensor* prototype, ManagedTensor** out, void* error_context,
                                  void (*set_error)(void* error_context, const char* kind, const char* message));
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*tensor_from_py_object_no_sync)(void* py_object, Tensor* out);  // may be null
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out_stream);
};

static_assert(sizeof(void*) == 8, "lipcore supports 64-bit platforms");
static_assert(sizeof(Device) == 8 && sizeof(DataType) == 4 && sizeof(Version) == 8);
static_assert(sizeof(Tensor) == 48);
static_assert(offsetof(Tensor, device) == 8 && offsetof(Tensor, ndim) == 16 && offsetof(Tensor, dtype) == 20);
static_assert(offsetof(Tensor, shape) == 24 && offsetof(Tensor, strides) == 32 && offsetof(Tensor, byte_offset) == 40);
static_assert(sizeof(ManagedTensor) == 80 && offsetof(ManagedTensor, deleter) == 16);
static_assert(offsetof(ManagedTensor, tensor) == 32);
static_assert(sizeof(ExchangeApi) == 56);
static_assert(offsetof(ExchangeApi, previous) == 8 && offsetof(ExchangeApi, managed_tensor_allocator) == 16);
static_assert(offsetof(ExchangeApi, tensor_from_py_object_no_sync) == 40);
static_assert(offsetof(ExchangeApi, current_work_stream) == 48);

}  // namespace lipcore::dlpack
