// Which query blocks the CTA of a key block visits in the backward, in which order, and whose addition to dQ
// comes before its own in deterministic mode. Compiles for host and device.
#pragma once

#include "common/block_range.h"

namespace hopper_fa {

constexpr int kMaxGroup = 128;  // times the most query blocks, 2^25 - 16, it fits 32 bits

struct QueryWalk {
  int first, count;     // query blocks [first, first + count) see a key of the block
  int start;            // the walk begins at first + start and wraps round
  int member, members;  // place of the key block in its group; 0 members: causal

  HOPPER_FA_HOST_DEVICE int block(int step) const {
    int const i = start + step;
    return first + (i < count ? i : i - count);
  }
};

// Causal: from the diagonal on. So if all CTAs of a head began at once, query block m would be visited by key
// blocks in descending order, one a step.
// Full: key blocks form groups of at most group_size <= kMaxGroup, and the members of a group begin at
// different query blocks, spread evenly: again no two are at the same one at a time.
HOPPER_FA_HOST_DEVICE QueryWalk query_walk(int n_block, int n_blocks, int m_blocks, int seqlen_q,
                                           int seqlen_k, int block_m, int block_n, bool causal,
                                           int group_size) {
  if (causal) {
    int const first_row = max_int(0, n_block * block_n - (seqlen_k - seqlen_q));  // the first that sees a key
    int const first = min_int(first_row / block_m, m_blocks);
    return {first, m_blocks - first, 0, n_block, 0};
  }
  int const group_first = n_block / group_size * group_size;
  int const members = min_int(group_size, n_blocks - group_first);
  int const member = n_block - group_first;
  return {0, m_blocks, static_cast<int>(unsigned(member) * m_blocks / members), member, members};
}

// How many CTAs add to query block m before this one. All orders are those in which lockstep would bring them
// there, and no CTA waits for one that is launched later: causal ones are launched last key block first, and
// those of a group fit the device together.
HOPPER_FA_HOST_DEVICE int dq_turn(QueryWalk const& walk, int n_block, int n_blocks, int m_block, int seqlen_q,
                                  int seqlen_k, int block_m, int block_n, int group_size) {
  if (walk.members == 0) {
    int const last_row = m_block * block_m + (block_m - 1);
    int const last = min_int(n_blocks - 1, (last_row + (seqlen_k - seqlen_q)) / block_n);
    return last - n_block;
  }
  // Of the group's members, those that begin at block m or before come first, the last of them first.
  int const begun = static_cast<int>((unsigned(m_block + 1) * walk.members - 1) / walk.count + 1);
  int const before = min_int(walk.members, begun);
  int const in_group =
      walk.member < before ? before - 1 - walk.member : before + (walk.members - 1 - walk.member);
  return n_block / group_size * group_size + in_group;
}

}  // namespace hopper_fa
