// Where the quantisation kernels find and put things: index arithmetic without memory. Compiles for host and
// device, so that tests/cpu can check it.
#pragma once

#include <cstdint>

#include "common/block_range.h"

namespace hopper_fa {

constexpr int kStatsChunk = 128;  // tokens whose sum is formed first in a mean
constexpr int kStatsLanes = 16;   // sums a chunk, which are then added pairwise
constexpr int kStatsCtas = 8;     // of a head at most, each with a sum of chunks
constexpr int kVSlice = 32;       // channels of V that a warp rounds, and that a CTA finishes
constexpr int kKeyGroup = 16;     // keys that are permuted among themselves in V
constexpr int kGroupSlots = kKeyGroup * kVSlice / 8;  // of 8 elements in 16 bits
constexpr int kMaxHeadDim = 256;
constexpr int kRotateGroup = 16;  // columns that one product of the rotation mixes

// The sampled token of 2^shift neighbours, by a multiplicative hash of their group's number: no short period
// of the tokens is one of the sample.
HOPPER_FA_HOST_DEVICE int sampled_token(int group, int shift) {
  return shift == 0 ? group : (group << shift) + static_cast<int>(group * 0x9e3779b1u >> (32 - shift));
}

// Channels that the attention kernel's tile has.
HOPPER_FA_HOST_DEVICE int tile_columns(int head_dim) {
  return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256;
}

// Key 8 h + 2 t + i of a group of 16 lies at position 4 t + 2 h + i. Here position -> key.
HOPPER_FA_HOST_DEVICE int key_at(int position) {
  return (position >> 1 & 1) * 8 + (position >> 2) * 2 + (position & 1);
}

// 0xff in each byte of word `word` (0..3) of a group whose key exists, when `keys` of its 16 keys do.
HOPPER_FA_HOST_DEVICE uint32_t key_mask(int word, int keys) {
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= (key_at(4 * word + i) < keys ? 0xffu : 0u) << (8 * i);
  return mask;
}

// Size of the power-of-two block of the rotation that column < head_dim lies in; largest first, 72 = 64 + 8.
// NOTE: a block that starts where head_dim and column first differ, from the top bit down, and ends with
// head_dim's bit there. Columns past head_dim get a size whose partners are past it too.
HOPPER_FA_HOST_DEVICE int hadamard_block(int column, int head_dim) {
  int bits = head_dim ^ column;
  bits |= bits >> 1, bits |= bits >> 2, bits |= bits >> 4, bits |= bits >> 8;
  return bits - (bits >> 1);
}

// 1 / sqrt(block) in float32, block = 8, 16, ..., 256 (1 for what is no block).
HOPPER_FA_HOST_DEVICE float hadamard_norm(int block) {
  return block == 8     ? 0.353553390593273762f
         : block == 16  ? 0.25f
         : block == 32  ? 0.176776695296636881f
         : block == 64  ? 0.125f
         : block == 128 ? 0.0883883476483184406f
         : block == 256 ? 0.0625f
                        : 1.f;
}

constexpr int kVThreads = 256, kVCtas = 2;  // of a CTA that rounds V; of those an SM shall hold

// Groups of 16 keys in a CTA's part of V that is e4m3 already: enough for full lines of 128 bytes, and for
// 128 threads or more.
HOPPER_FA_HOST_DEVICE int v_tile_groups(int head_dim) { return head_dim <= 64 ? 16 : 8; }

// Slot of 16 bytes in shared memory for key group `group` of channel `channel`.
// NOTE: eight threads write neighbouring octets of channels at once, and eight read neighbouring groups of
// one channel; the exclusive or spreads both over all banks.
HOPPER_FA_HOST_DEVICE int v_slot(int channel, int group, int groups) {
  return channel * groups + (group ^ (channel / 8 % 8));
}

// Slot of 16 bytes in a row of Q or K for its columns 8 octet ... .
// NOTE: sixteen threads read a quarter of a group of 16 columns each, of four neighbouring rows; the
// exclusive or spreads them over all banks. Padding would too, but copies to lines of 128 bytes that are not
// whole take longer: by a tenth of the kernel where they begin at odd slots.
HOPPER_FA_HOST_DEVICE int row_slot(int row, int octet) { return octet ^ 2 * (row % 4); }

// Slot of 16 bytes for channels 8 octet ... of token `token` of 16, in 32 channels that are to be rounded.
// NOTE: eight threads write two tokens, four a token; and sixteen read half a slot each, of two octets of
// every other token of eight. The exclusive or spreads both over all banks.
HOPPER_FA_HOST_DEVICE int token_slot(int token, int octet) {
  return token / 2 * 8 + ((token % 2 * 4 + octet) ^ (2 * (token / 2 % 4)));
}

// The same for the codes of 32 channels in 8 key groups: eight threads have neighbouring quads of channels,
// and four a word each of a slot.
HOPPER_FA_HOST_DEVICE int code_slot(int channel, int group) { return channel * 8 + (group ^ channel / 4); }

// n / divisor for 0 <= n < 2^31 by one multiplication.
struct Divisor {
  int divisor;
  uint32_t multiplier;
  int shift;

  HOPPER_FA_HOST_DEVICE int quotient(int n) const {
    return static_cast<int>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

inline Divisor make_divisor(int divisor) {
  int shift = 31;
  while ((int64_t{1} << (shift - 31)) < divisor) ++shift;
  return {divisor, static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor), shift};
}

// A CTA's share of a tensor: `block` counts rows, keys or tokens in CTA-sized steps.
struct QuantizeTile {
  int block, head, batch;
};

// A head's tiles, of all batch entries, have positions; neighbouring CTAs take neighbouring heads, which lie
// beside each other in memory.
struct QuantizeTiles {
  Divisor heads, blocks;

  HOPPER_FA_HOST_DEVICE QuantizeTile at(int position, int head) const {
    int const batch = blocks.quotient(position);
    return {position - batch * blocks.divisor, head, batch};
  }
  HOPPER_FA_HOST_DEVICE QuantizeTile get(int index) const {
    int const position = heads.quotient(index);
    return at(position, index - position * heads.divisor);
  }
};

inline QuantizeTiles make_quantize_tiles(int heads, int blocks) {
  return {make_divisor(heads), make_divisor(blocks)};
}

}  // namespace hopper_fa
