// The part of the DLPack ABI that is read here: a tensor's description, and the exchange API that hands it out of a
// Python object without an allocation. Declared, not vendored; the major version is checked at run time.
// Source: the DLPack specification, version 1.x (struct layouts are ABI).
#pragma once

#include <cstdint>

namespace lora_fuse::dlpack {

constexpr uint32_t kMajorVersion = 1;

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null means row-major
  uint64_t byte_offset;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* prev;  // an older major version, or null
};
struct ExchangeApi {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*tensor_from_py_object)(void* py_object, Tensor* out);  // borrows; 0 on success
  void* current_work_stream;
};

}  // namespace lora_fuse::dlpack
