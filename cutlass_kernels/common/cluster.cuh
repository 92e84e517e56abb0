// What CTAs of a cluster need of each other: their rank, a barrier, and each other's shared memory.
// kCtas is the cluster's size; of a lone CTA (1) nothing is remote, and the functions are the plain ones.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "common/pipeline.cuh"

namespace hopper_fa {

template <int kCtas>
__device__ __forceinline__ int cluster_rank() {
  if constexpr (kCtas == 1)
    return 0;
  else
    return cute::block_rank_in_cluster();
}

// All threads of all CTAs. What they wrote to shared memory before, all of them see after.
template <int kCtas>
__device__ __forceinline__ void sync_ctas() {
  if constexpr (kCtas == 1)
    __syncthreads();
  else
    cute::cluster_sync();
}

// Arrival of one thread on the barrier of the CTA of that rank.
// NOTE: plain, as CUTLASS's own: with .release.cluster it would wait for all global stores of the thread
// first.
template <int kCtas>
__device__ __forceinline__ void arrive(uint64_t* barrier, int rank) {
  if constexpr (kCtas == 1)
    EmptyBarrier::arrive(barrier);
  else
    EmptyBarrier::arrive(barrier, rank, true);
}

// Writes words to where `to` lies in the CTA of that rank, and arrives there on `full`, which completes once
// they have landed.
template <int kWords>
__device__ __forceinline__ void send(int const (&words)[kWords], int* to, uint64_t* full, int rank) {
  FullBarrier::arrive_and_expect_tx(full, sizeof(words), rank, true);
  CUTE_UNROLL
  for (int i = 0; i < kWords; ++i)
    asm volatile(
        "{.reg .u32 word, barrier;\n"
        "mapa.shared::cluster.u32 word, %0, %2;\n"
        "mapa.shared::cluster.u32 barrier, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [word], %3, [barrier];}" ::"r"(
            cute::cast_smem_ptr_to_uint(to + i)),
        "r"(cute::cast_smem_ptr_to_uint(full)), "r"(rank), "r"(words[i])
        : "memory");
}

}  // namespace hopper_fa
