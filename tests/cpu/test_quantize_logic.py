"""The quantisation kernels' host-compiled index arithmetic, against quantization.py and brute force."""

import math
import random

import pytest
import torch

from hopper_fa import quantization
from hopper_fa.kernels import _C, STATUS_SENTENCES
from hopper_fa.token_stats import sampled_tokens

HEAD_DIMS = range(8, 257, 8)
SHARED_MEMORY_BANKS = 8  # of 16 bytes: what eight threads read or write at once


def test_key_order_is_that_of_quantization() -> None:
    keys = torch.arange(48)
    expected = quantization._permute_keys(keys).tolist()
    assert [p // 16 * 16 + _C.key_at(p % 16) for p in range(48)] == expected


def test_key_mask_marks_the_keys_that_exist() -> None:
    for keys in (-5, *range(18)):
        for word in range(4):
            mask = _C.key_mask(word, keys)
            for i in range(4):
                assert mask >> 8 * i & 0xFF == (0xFF if _C.key_at(4 * word + i) < keys else 0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_hadamard_blocks_are_those_of_quantization(head_dim: int) -> None:
    """Largest power of two first; and no column past head_dim has a partner before it."""
    column = 0
    while column < head_dim:
        size = 1 << ((head_dim - column).bit_length() - 1)
        assert {_C.hadamard_block(c, head_dim) for c in range(column, column + size)} == {size}
        norm = torch.tensor(1 / math.sqrt(size), dtype=torch.float32).item()
        assert _C.hadamard_norm(size) == norm
        column += size
    for c in range(head_dim, 256):
        block = _C.hadamard_block(c, head_dim)
        partners = [c ^ (1 << bit) for bit in range(8) if 1 << bit < block]
        assert all(partner >= head_dim for partner in partners)
        assert all(_C.hadamard_block(partner, head_dim) == block for partner in partners)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_v_slots(head_dim: int) -> None:
    """Every (channel, group) has a slot of its own, and no eight threads meet in a bank."""
    groups = _C.v_tile_groups(head_dim)
    slots = {(c, g): _C.v_slot(c, g, groups) for c in range(head_dim) for g in range(groups)}
    assert sorted(slots.values()) == list(range(head_dim * groups))

    def banks(threads: list[tuple[int, int]]) -> int:
        return len({slots[thread] % SHARED_MEMORY_BANKS for thread in threads})

    for c in range(head_dim):  # eight neighbouring groups of a channel are read
        for g in range(0, groups, 8):
            assert banks([(c, g + i) for i in range(8)]) == 8
    if head_dim % 64 == 0:  # the same channel of eight neighbouring octets is written
        for c in range(0, head_dim, 64):
            for g in range(groups):
                assert banks([(c + 8 * i, g) for i in range(8)]) == 8


def test_sampled_tokens() -> None:
    """One of each whole group, the kernels' the same."""
    for seqlen in (0, 1, 127, 255, 256, 300, 511, 512, 1023, 1024, 1031, 16384):
        for shift in range(7):
            tokens = sampled_tokens(seqlen, shift).tolist()
            assert [token >> shift for token in tokens] == list(range(seqlen >> shift))
            assert tokens == [_C.sampled_token(group, shift) for group in range(seqlen >> shift)]
    # No period of tokens up to 64 meets the same of its tokens again and again.
    tokens = sampled_tokens(16384, 3)
    for period in range(2, 65):
        counts = torch.bincount(tokens % period, minlength=period)
        assert counts.max() < 1.5 * len(tokens) / period and counts.min() > 0.5 * len(tokens) / period


@pytest.mark.skipif("bf16" not in _C.quantize_dtypes(), reason="this build holds no quantisation kernels")
def test_statistics_refuse_what_v_would_misread() -> None:
    """A sample's maxima without a place to note what outgrows them, of shared scales; and the reverse."""
    x = torch.zeros(2, 1100, 4, 72, dtype=torch.bfloat16)
    mean, amax, outgrown = (torch.zeros(576) for _ in range(3))
    refused = [
        (3, amax, "channel", None),
        (3, amax, "head", outgrown),
        (3, amax, "tensor", None),
        (0, amax, "channel", outgrown),
        (3, None, "none", outgrown),
        (7, None, "none", None),
        (-1, None, "none", None),
    ]
    for shift, amax_of, granularity, flags in refused:
        pointers = [0 if t is None else t.data_ptr() for t in (mean, amax_of, flags)]
        status = _C.token_stats(
            _C.DTYPES["bf16"], x.data_ptr(), *x.stride()[:3], *x.shape, shift, *pointers[:2],
            _C.GRANULARITIES[granularity], pointers[2], _C.OVERLAPS["none"], 0,
        )  # fmt: skip
        assert "refused" in STATUS_SENTENCES[status], (shift, granularity)


def test_slots_of_rows() -> None:
    """Every octet of a row has a slot of its own, in its line of 128 bytes; no two threads meet in a bank."""
    for row in range(32):
        assert sorted(_C.row_slot(row, o) for o in range(32)) == list(range(32))
        assert all(_C.row_slot(row, o) // 8 == o // 8 for o in range(32))
    for group in range(16):  # sixteen threads read halves of two octets of four rows
        for row in range(0, 32, 4):
            slots = {_C.row_slot(row + i, 2 * group + j) for i in range(4) for j in range(2)}
            assert len({slot % SHARED_MEMORY_BANKS for slot in slots}) == 8


def test_slots_of_a_warp_that_rounds_v() -> None:
    """Every piece of 16 tokens or 8 key groups has a slot of its own; no two threads meet in a bank."""
    slots = {(t, o): _C.token_slot(t, o) for t in range(16) for o in range(4)}
    assert sorted(slots.values()) == list(range(16 * 4))
    for t in range(0, 16, 2):  # eight threads copy two tokens
        assert len({slots[t + i, o] % SHARED_MEMORY_BANKS for i in range(2) for o in range(4)}) == 8
    for t in (0, 1, 8, 9):  # sixteen threads read halves of two octets of every other token
        for o in (0, 2):
            read = {slots[t + 2 * i, o + j] for i in range(4) for j in range(2)}
            assert len({slot % SHARED_MEMORY_BANKS for slot in read}) == 8

    slots = {(c, g): _C.code_slot(c, g) for c in range(32) for g in range(8)}
    assert sorted(slots.values()) == list(range(32 * 8))
    for c in range(32):  # the eight groups of a channel are read
        assert len({slots[c, g] % SHARED_MEMORY_BANKS for g in range(8)}) == 8
    for c in range(4):  # eight threads write the same channel of neighbouring quads
        for g in range(8):
            assert len({slots[c + 4 * i, g] % SHARED_MEMORY_BANKS for i in range(8)}) == 8


def test_tiles_are_counted_heads_first(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [1, 2, 3, 5, 7, 8, 16, 31, 64, 100, 127, 1000, 2**16, 2**20 + 1, 2**30, 2**31 - 1]
    for _ in range(5000):
        heads, blocks = rng.choice(sizes), rng.choice(sizes)
        edge = rng.choice([heads, heads * blocks, 2**31]) + rng.randint(-2, 2)
        index = min(max(0, rng.choice([edge, rng.randrange(2**31)])), 2**31 - 1)
        row, head = divmod(index, heads)
        assert _C.quantize_tile(index, heads, blocks) == (row % blocks, head, row // blocks)
