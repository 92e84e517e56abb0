// THE tile table: every tile shape, stage count and register budget of the project stands here and nowhere
// else. Read by the kernels, the host launcher and, through hopper_fa._C, by the emulator and the
// experiments.
#pragma once

namespace hopper_fa {

// When a warpgroup hands the tensor cores to the next one: once the product is issued. Without overlap a turn
// is P V, waited for, and QK of the next block, issued.
enum class PingPong { kNever, kAfterQK, kAfterPV };

// How the output leaves: from registers, or by TMA from its tile's Q stage or from shared memory of its own
// (8-bit only).
enum class Store { kPlain, kQStage, kPlace };

struct ForwardTile {
  char const* variant;      // users run "default" and, with 8-bit inputs, those that begin with fp8
  int head_dim;             // largest head dim the instance takes; smaller ones are zero-padded by the loads
  int block_m;              // query rows a CTA tile; 64 a consumer warpgroup
  int block_n;              // keys a step
  int q_stages;             // tiles whose Q is in shared memory; 2: the next one loads beside this one
  int kv_stages;            // K or V blocks in flight (one ring holds both)
  int producer_registers;   // setmaxnreg of the loading warpgroup; 0: no warp specialisation
  int consumer_registers;   // setmaxnreg of the computing warpgroups
  PingPong ping_pong;       // when a warpgroup's turn on the tensor cores ends
  bool overlap;             // QK of the next block is issued before PV of this one
  int fma_exp2_octets;      // of 8 column octets, how many have exp2 on the FP32 pipe; 8-bit: 0, or 8: by P's
                            // code
  float rescale_threshold;  // 16-bit only: most log2 growth of the row maximum that O is not rescaled for
  int element_bytes = 2;    // of Q, K and V
  // 8-bit only. Two-level accumulation: P V of a block goes into a temporary, in so many parts of its
  // columns, and is added to O in FP32. 0: P V accumulates in O itself.
  int pv_parts = 0;
  Store store = Store::kPlain;
  int pv_in_flight = 1;  // 8-bit only: how many of those parts are queued at a time
  int qk_parts = 1;  // 8-bit only: 2: S = Q K^T in halves of the keys, the first's maxima beside the second
  bool key_vectors = false;  // 8-bit only: every key has a scale and a bias of its own
  // 8-bit with overlap only: O is moved to FP32 sums in global memory every few blocks (forward/flush.cuh).
  bool flush = false;
  // 16-bit only: O is rescaled too where a new maximum's P is 2^-peak_bits of the row's sum or more, as its
  // rounding counts then.
  int peak_bits = 1;
};

constexpr ForwardTile kForwardTiles[] = {
    // variant, d, M, N, Q stages, K/V stages, regs, ping-pong, overlap, fma_exp2_octets, threshold
    // and, where they are not 16-bit inputs' and the plain output's: element bytes, PV parts, store,
    // parts in flight
    {"default", 64, 192, 128, 2, 10, 32, 160, PingPong::kAfterPV, true, 0, 8.0f, 2, 0, Store::kQStage},
    {"default", 128, 128, 128, 2, 5, 24, 240, PingPong::kAfterPV, true, 0, 8.0f, 2, 0, Store::kQStage},
    {"default", 256, 128, 64, 1, 5, 24, 240, PingPong::kAfterPV, true, 0, 8.0f},
    // 8-bit inputs.
    {"fp8", 64, 256, 128, 2, 12, 32, 112, PingPong::kAfterPV, false, 0, 0.0f, 1, 1, Store::kPlace, 1, 2},
    {"fp8", 128, 192, 128, 2, 6, 32, 160, PingPong::kAfterPV, false, 0, 0.0f, 1, 4, Store::kPlace, 2},
    {"fp8", 256, 128, 128, 1, 5, 24, 240, PingPong::kNever, false, 0, 0.0f, 1, 4, Store::kPlain, 2},
    // P by its code: nothing waits for exponentials, and turns cost more than they order.
    {"fp8_linear", 64, 256, 128, 2, 12, 32, 112, PingPong::kNever, false, 8, 0.0f, 1, 1, Store::kPlace},
    {"fp8_linear", 128, 192, 128, 2, 6, 32, 160, PingPong::kNever, false, 8, 0.0f, 1, 4, Store::kPlace, 2},
    {"fp8_raw", 64, 192, 128, 2, 12, 32, 160, PingPong::kAfterPV, false, 0, 0.0f, 1},
    {"fp8_raw", 128, 192, 128, 2, 9, 32, 160, PingPong::kAfterPV, false, 0, 0.0f, 1},
    {"fp8_raw", 256, 128, 128, 1, 5, 24, 240, PingPong::kNever, true, 0, 0.0f, 1},
    // O moves to FP32 sums in global memory; last column: flush.
    {"fp8_flush", 256, 128, 128, 2, 4, 24, 240, PingPong::kNever, true, 0, 0.0f, 1, 0, Store::kQStage, 1, 1,
     false, true},
    // 8-bit inputs whose keys have a scale and a bias each.
    {"fp8_keys", 64, 192, 128, 2, 12, 32, 160, PingPong::kAfterPV, false, 0, 0.0f, 1, 1, Store::kPlain, 1, 2,
     true},
    {"fp8_keys", 128, 128, 128, 2, 10, 40, 232, PingPong::kAfterPV, false, 0, 0.0f, 1, 1, Store::kPlain, 1, 2,
     true},
    {"fp8_keys", 256, 128, 128, 1, 5, 24, 240, PingPong::kNever, false, 0, 0.0f, 1, 4, Store::kPlain, 2, 1,
     true},
    // One switch at a time off, beside the default of the same head dim (experiments/forward_ablation.py).
    // NOTE: two of them store their output from registers too, which costs 1 to 3%, and none but the first
    // has two P (mainloop.cuh), which is worth 2%.
    {"no_warp_specialisation", 128, 128, 128, 2, 5, 0, 0, PingPong::kAfterPV, true, 0, 8.0f},
    {"no_ping_pong", 128, 128, 128, 2, 5, 24, 240, PingPong::kNever, true, 0, 8.0f, 2, 0, Store::kQStage},
    {"no_overlap", 128, 128, 128, 2, 5, 24, 240, PingPong::kAfterPV, false, 0, 8.0f},
    // Tried and slower (experiments/forward_tiles.py, docs/notes/kernel_log.md).
    {"one_q_stage", 128, 128, 128, 1, 6, 24, 240, PingPong::kAfterPV, true, 0, 8.0f},
    {"wide", 128, 128, 192, 1, 4, 24, 240, PingPong::kAfterPV, true, 0, 8.0f},
    {"wide", 256, 128, 96, 1, 3, 24, 240, PingPong::kAfterPV, true, 0, 8.0f},
    {"eager_rescale", 64, 192, 128, 2, 10, 32, 160, PingPong::kAfterPV, true, 0, 0.0f},
    {"eager_rescale", 128, 128, 128, 2, 5, 24, 240, PingPong::kAfterPV, true, 0, 0.0f, 2, 0, Store::kQStage},
    {"fma_exp2", 64, 192, 128, 2, 10, 32, 160, PingPong::kAfterPV, true, 1, 8.0f},
    {"early_pass", 64, 192, 128, 2, 10, 32, 160, PingPong::kAfterQK, true, 0, 8.0f},
    {"plain_store", 64, 192, 128, 2, 10, 32, 160, PingPong::kAfterPV, true, 0, 8.0f},
    {"fp8_no_ping_pong", 128, 192, 128, 2, 6, 32, 160, PingPong::kNever, false, 0, 0.0f, 1, 4, Store::kPlace,
     2},
};
constexpr int kNumForwardTiles = sizeof(kForwardTiles) / sizeof(kForwardTiles[0]);

constexpr bool same_text(char const* a, char const* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

// Row of kForwardTiles for an instance of instances.cmake; -1 if the table has none.
constexpr int forward_tile_index(int head_dim, char const* variant) {
  for (int i = 0; i < kNumForwardTiles; ++i)
    if (kForwardTiles[i].head_dim == head_dim && same_text(kForwardTiles[i].variant, variant)) return i;
  return -1;
}

// Rows of a V block as it lies in shared memory: keys, or for 8-bit V, which is transposed, channels and 8
// rows of which the first is ones and the others, which global memory lacks, are zeros.
constexpr int forward_v_rows(ForwardTile const& t) {
  return t.element_bytes == 1 ? t.head_dim + 8 : t.block_n;
}

// Whether the row sum of P is a column of the output.
constexpr bool forward_row_sum_column(ForwardTile const& t) { return t.pv_parts > 0 || t.flush; }

// 8 bit: floats of global memory that a CTA's warpgroups move O to.
constexpr int forward_flush_floats(ForwardTile const& t) { return t.flush ? t.block_m * t.head_dim : 0; }

// Bytes of a slot of the K/V ring.
constexpr int forward_slot_bytes(ForwardTile const& t) {
  int const k = t.block_n * t.head_dim * t.element_bytes;
  return t.element_bytes == 1 ? t.block_n * forward_v_rows(t) : k;
}

// Bytes of a block's scales and biases of keys. They lie behind K in its slot, which has room for V.
constexpr int forward_key_vector_bytes(ForwardTile const& t) { return t.key_vectors ? 2 * t.block_n * 4 : 0; }

// 8 bit: bytes of v_scale and v_mean, for every warpgroup and one tile more than Q has stages.
constexpr int forward_affine_bytes(ForwardTile const& t) {
  return t.element_bytes == 1 ? (t.q_stages + 1) * (t.block_m / 64) * t.head_dim * 8 : 0;
}

// 8 bit: bytes of the scales of a tile's rows.
constexpr int forward_scale_bytes(ForwardTile const& t) {
  return t.element_bytes == 1 ? t.q_stages * t.block_m * 4 : 0;
}

// Bytes of the maxima that moved sums are relative to, two rows a thread.
constexpr int forward_reference_bytes(ForwardTile const& t) { return t.flush ? t.block_m / 64 * 128 * 8 : 0; }

// 8 bit: bytes of the output's own place.
constexpr int forward_output_bytes(ForwardTile const& t) {
  return t.store == Store::kPlace ? t.block_m * t.head_dim * 2 : 0;
}

// Bytes of the warpgroups' parts of two tiles.
constexpr int forward_queue_bytes(ForwardTile const& t) { return t.block_m / 64 * 64; }

// Shared memory of a CTA in bytes: Q, the K/V ring, V's dequantisation, 1 KB to align them, barriers.
constexpr int forward_shared_memory(ForwardTile const& t) {
  return t.q_stages * t.block_m * t.head_dim * t.element_bytes + t.kv_stages * forward_slot_bytes(t) +
         forward_affine_bytes(t) + forward_scale_bytes(t) + forward_reference_bytes(t) +
         forward_output_bytes(t) + forward_queue_bytes(t) + 1024 + 512;
}

// Of the backward of an 8-bit forward (backward/codes.cuh), which query rows have one dequantisation factor.
enum class Factors { kNone, kBlock, kRow };  // 16-bit forward; 64 rows or more; every row has its own

struct BackwardTile {
  char const* variant;
  int head_dim;            // as in ForwardTile
  int block_m;             // query rows a step
  int block_n;             // keys of a CTA
  int q_stages;            // query blocks of Q in shared memory
  int do_stages;           // the same of dO
  int ds_stages;           // score gradients of so many steps in shared memory
  int producer_registers;  // setmaxnreg, as in ForwardTile
  int consumer_registers;
  bool split;            // the two warpgroups share 64 keys: mainloop_split.cuh
  int dq_registers = 0;  // setmaxnreg of a warpgroup for dQ = dS K; 0: the computing ones multiply it
  Factors factors = Factors::kNone;
};

constexpr BackwardTile kBackwardTiles[] = {
    // variant, d, M, N, Q, dO and dS stages, regs
    {"default", 64, 128, 128, 2, 2, 2, 24, 208, false, 72},
    {"default", 128, 64, 128, 2, 2, 2, 24, 240, false},
    {"default", 256, 64, 64, 2, 1, 1, 24, 240, true},
    // Of an 8-bit forward. NOTE: a factor a row costs d64 and d128 a tenth, and d256 a hundredth: there one
    // instance is for all recipes.
    {"quantized", 64, 128, 128, 2, 2, 2, 24, 208, false, 72, Factors::kBlock},
    {"quantized", 128, 64, 128, 2, 2, 2, 24, 240, false, 0, Factors::kBlock},
    {"quantized", 256, 64, 64, 2, 1, 1, 24, 240, true, 0, Factors::kRow},
    {"quantized_rows", 64, 128, 128, 2, 2, 2, 24, 208, false, 72, Factors::kRow},
    {"quantized_rows", 128, 64, 128, 2, 2, 2, 24, 240, false, 0, Factors::kRow},
    // Tried and slower (docs/notes/backward_log.md).
    {"no_dq_warpgroup", 64, 128, 128, 2, 2, 2, 24, 240, false},
};
constexpr int kNumBackwardTiles = sizeof(kBackwardTiles) / sizeof(kBackwardTiles[0]);

// One loading and two computing warpgroups, and the one for dQ.
constexpr int backward_threads(BackwardTile const& t) { return (t.dq_registers ? 4 : 3) * 128; }

// Shared memory of a CTA in bytes: K and V, the blocks of Q and dO with their rows of bias and delta, dS, a
// chunk of dQ for each warpgroup, P if split, 1 KB to align them, barriers.
constexpr int backward_shared_memory(BackwardTile const& t) {
  int const chunk = 64 * 64 * 4, blocks = t.q_stages + t.do_stages;
  // Blocks of rows of bias, delta and, quantized, factors.
  int const rows = blocks + (t.factors != Factors::kNone ? t.q_stages : 0);
  return 4 * t.block_n * t.head_dim + 2 * blocks * t.block_m * t.head_dim + 4 * rows * t.block_m +
         2 * t.ds_stages * t.block_m * t.block_n + (t.split ? 3 : 2) * chunk + 1024 + 512;
}

// As forward_tile_index, of kBackwardTiles.
constexpr int backward_tile_index(int head_dim, char const* variant) {
  for (int i = 0; i < kNumBackwardTiles; ++i)
    if (kBackwardTiles[i].head_dim == head_dim && same_text(kBackwardTiles[i].variant, variant)) return i;
  return -1;
}

}  // namespace hopper_fa
