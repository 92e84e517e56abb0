// The order in which tiles are computed. CTA i starts with tile i; whoever finishes takes the next one off a
// counter. Compiles for host and device.
#pragma once

#include "common/block_range.h"

namespace hopper_fa {

struct Tile {
  int m_block, head, batch;  // head of Q
};

struct TileScheduler {
  int m_blocks;            // ceil(seqlen_q / rows of a tile)
  int heads_q, num_tiles;  // num_tiles = batch * heads_q * m_blocks
  int num_heads;           // batch * heads_q
  int section_heads;       // (batch, head) pairs whose K and V share the L2 cache at a time
  bool longest_first;      // causal: last query rows first, section by section

  // The index-th tile in order; index < num_tiles.
  HOPPER_FA_HOST_DEVICE Tile get(int index) const {
    Tile tile;
    int head_batch;
    if (longest_first) {
      int const section = index / (section_heads * m_blocks);
      int const in_section = index - section * (section_heads * m_blocks);
      int const heads = min_int(section_heads, num_heads - section * section_heads);  // last one: fewer
      tile.m_block = m_blocks - 1 - in_section / heads;
      head_batch = section * section_heads + in_section % heads;
    } else {
      head_batch = index / m_blocks;
      tile.m_block = index - head_batch * m_blocks;
    }
    tile.batch = head_batch / heads_q;
    tile.head = head_batch - tile.batch * heads_q;
    return tile;
  }
};

// kv_bytes: K and V of one head of one batch entry; q_heads_per_kv of them share it.
inline TileScheduler make_tile_scheduler(int batch, int heads_q, int q_heads_per_kv, int seqlen_q,
                                         int tile_rows, long long kv_bytes, bool causal,
                                         int min_section_heads = 16) {
  constexpr long long kL2Budget = 32LL << 20;  // of Hopper's 50 MB; the rest is for Q and O passing through
  // NOTE: a section ends in short tiles and the next begins with long ones, so a small last section
  // unbalances the end. 16 heads are few enough that 8 CTAs read the same keys at the same time, whether or
  // not these fit the L2 cache.
  TileScheduler s;
  s.m_blocks = ceil_div(seqlen_q, tile_rows);
  s.heads_q = heads_q;
  s.num_heads = batch * heads_q;
  s.num_tiles = s.num_heads * s.m_blocks;
  long long const kv_heads = kv_bytes > 0 ? kL2Budget / kv_bytes : batch * heads_q;
  long long const fitting = kv_heads * q_heads_per_kv;
  long long const q_heads = fitting > min_section_heads ? fitting : min_section_heads;
  s.section_heads = q_heads < batch * heads_q ? static_cast<int>(q_heads) : batch * heads_q;
  s.longest_first = causal;
  return s;
}

// How many computing warpgroups of a CTA to use: all for large problems; fewer, hence smaller tiles, where
// the tiles would not fill the machine.
inline int choose_warpgroups(int max_warpgroups, int heads_total, int seqlen_q, int num_sms) {
  // Time of a tile of w + 1 warpgroups over that of a full tile.
  // NOTE: fewer warpgroups hide less softmax; a lone warpgroup costs more than its share of a full tile.
  constexpr float kRelativeCost[4][4] = {
      {1.0f}, {0.62f, 1.0f}, {0.5f, 0.72f, 1.0f}, {0.4f, 0.56f, 0.78f, 1.0f}};
  float const(&cost)[4] = kRelativeCost[max_warpgroups - 1];
  int best = max_warpgroups;
  float best_time = 0;
  for (int w = max_warpgroups; w >= 1; --w) {
    int const m_blocks = ceil_div(seqlen_q, 64 * w);
    int const in_last =
        ceil_div(seqlen_q - 64 * w * (m_blocks - 1), 64);  // warpgroups with rows in the last tile
    float const waves = static_cast<float>(heads_total) * m_blocks / num_sms;
    float const work =
        static_cast<float>(heads_total) * ((m_blocks - 1) * cost[w - 1] + cost[in_last - 1]) / num_sms;
    // In few waves the last one counts in full; in many, tiles of unequal length fill it up.
    float const whole_waves = static_cast<float>(static_cast<int>(waves) + (static_cast<int>(waves) < waves));
    float const time = waves > 4 ? work : whole_waves * cost[w - 1];
    if (w == max_warpgroups || time < best_time) best = w, best_time = time;
  }
  return best;
}

}  // namespace hopper_fa
