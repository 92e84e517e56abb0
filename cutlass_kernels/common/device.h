// The device that a launch would go to.
#pragma once

#include <cuda_runtime_api.h>

namespace hopper_fa {

// Multiprocessors of the current device, 0 if it is not compute capability 9.0.
inline int hopper_sms() {
  int device, major, minor, sms;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return major == 9 && minor == 0 ? sms : 0;
}

}  // namespace hopper_fa
