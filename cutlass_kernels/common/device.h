// The device that a launch would go to.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

namespace hopper_fa {

struct Device {
  int index, sms;  // the current one, and its multiprocessors; 0 if it is not compute capability 9.0
};
constexpr int kCachedDevices = 64;  // the first ones of a machine: what they answer is asked for once

inline Device hopper_device() {
  static std::atomic<int> known[kCachedDevices];  // 0: not asked yet
  Device device = {0, 0};
  if (cudaGetDevice(&device.index) != cudaSuccess) return device;
  bool const cached = device.index < kCachedDevices;
  if (cached) device.sms = known[device.index].load(std::memory_order_relaxed);
  if (device.sms > 0) return device;
  int major, minor, sms;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index) != cudaSuccess ||
      cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device.index) != cudaSuccess)
    return device;
  if (major == 9 && minor == 0) device.sms = sms;
  if (cached) known[device.index].store(device.sms, std::memory_order_relaxed);
  return device;
}

}  // namespace hopper_fa
