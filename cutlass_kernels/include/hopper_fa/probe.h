// A look at the FP8 tensor core itself, for the tests and docs/fp8.md.
#pragma once

#include "hopper_fa/types.h"

struct CUstream_st;

namespace hopper_fa {

// D = C + A B^T for independent problems of 64 x 8 x k, in steps of k = 32 with one accumulator that is never
// flushed.
struct AccumulatorProbeParams {
  void const* a;    // (problems, 64, k) e4m3
  void const* b;    // (problems, 8, k) e4m3
  float const* c;   // (problems, 64, 8)
  float* d;         // as c
  int problems, k;  // k a multiple of 32
};

Status run_accumulator_probe(AccumulatorProbeParams const& params, CUstream_st* stream);

}  // namespace hopper_fa
