"""The kernels' host-compiled logic: key-block bounds, tile order, warpgroup choice, the tile table."""

import heapq
import random

import pytest

from hopper_fa import kernels

SHARED_MEMORY_OF_A_CTA = 232_448  # bytes, compute capability 9.0
REGISTERS_OF_A_CTA = 65_536
SMS = 132
TABLE = [pytest.param(row, id=f"d{row['head_dim']}-{row['variant']}") for row in kernels.FORWARD_TILES]


def test_block_range_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [1, 2, 63, 64, 65, 127, 128, 130, 200]
    for _ in range(1500):
        rows, block_n = rng.choice([64, 128, 192]), rng.choice([16, 64, 80, 128])
        seqlen_q, seqlen_k = rng.choice(sizes), rng.choice([0, *sizes])
        row = rng.randrange(0, seqlen_q + rows, 64)
        causal = rng.random() < 0.7
        group = range(row, min(row + rows, seqlen_q))
        seen = [min(seqlen_k, max(0, i + 1 + seqlen_k - seqlen_q)) if causal else seqlen_k for i in group]
        end, unmasked = kernels.block_range(row, rows, seqlen_q, seqlen_k, causal, block_n)
        problem = (row, rows, seqlen_q, seqlen_k, causal, block_n)
        assert end == -(-max(seen, default=0) // block_n), problem
        assert unmasked == min(seen, default=0) // block_n, problem


def test_block_range_near_the_longest_sequence() -> None:
    longest = 2**31 - 1024 - 1
    row = (longest - 1) // 192 * 192
    assert kernels.block_range(row, 192, longest, longest, True, 128) == (
        -(-longest // 128),
        (row + 1) // 128,
    )
    assert kernels.block_range(row, 192, longest, 0, True, 128) == (0, 0)


def order_of(
    batch: int, heads_q: int, heads_kv: int, seqlen: int, tile_rows: int, head_dim: int, causal: bool
) -> list:
    kv_bytes = seqlen * head_dim * 2 * 2
    return kernels.tile_order(batch, heads_q, heads_q // heads_kv, seqlen, tile_rows, kv_bytes, causal)


def test_tile_order_covers_every_tile_once(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        heads_kv = rng.choice([1, 2, 3, 8])
        heads_q = heads_kv * rng.choice([1, 2, 4])
        batch, seqlen, tile_rows = (
            rng.randint(1, 5),
            rng.choice([1, 64, 100, 1000, 40_000]),
            rng.choice([64, 128, 192]),
        )
        order = order_of(batch, heads_q, heads_kv, seqlen, tile_rows, 128, rng.random() < 0.5)
        tiles = {
            (m, h, b) for m in range(-(-seqlen // tile_rows)) for h in range(heads_q) for b in range(batch)
        }
        assert len(order) == len(tiles) and set(order) == tiles


def test_causal_order_is_longest_first_within_each_head() -> None:
    order = order_of(2, 8, 2, 20_000, 128, 128, causal=True)
    for head in range(8):
        for batch in range(2):
            blocks = [m for m, h, b in order if (h, b) == (head, batch)]
            assert blocks == sorted(blocks, reverse=True)


def test_long_causal_problems_run_section_by_section() -> None:
    """Only a share of the heads is started before the first head is done, so that their keys stay in L2."""
    order = order_of(1, 64, 64, 16_384, 128, 128, causal=True)
    last_of_first_head = max(i for i, (_, head, _) in enumerate(order) if head == order[0][1])
    assert len({head for _, head, _ in order[: last_of_first_head + 1]}) <= 32


@pytest.mark.parametrize("seqlen", [1024, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_causal_work_is_balanced(head_dim: int, seqlen: int) -> None:
    """CTAs that draw a tile when they finish one, on the standard grid: the last ends 5% late at most."""
    tile = kernels.forward_tile(head_dim)
    heads = 2048 // head_dim
    batch = 16384 // seqlen
    order = order_of(batch, heads, heads, seqlen, tile["block_m"], head_dim, causal=True)

    def cost(m_block: int) -> float:
        row = m_block * tile["block_m"]
        end, _ = kernels.block_range(row, tile["block_m"], seqlen, seqlen, True, tile["block_n"])
        return end + 1.5  # prologue and epilogue of a tile, in key blocks

    costs = [cost(m) for m, _, _ in order]
    ctas = [0.0] * SMS
    for work in costs:
        heapq.heapreplace(ctas, ctas[0] + work)
    at_best = max(sum(costs) / SMS, max(costs))
    assert max(ctas) <= 1.05 * at_best


def test_choose_warpgroups() -> None:
    for most in (1, 2, 3, 4):
        assert kernels.choose_warpgroups(most, 64, 16_384, SMS) == most  # plenty of tiles: the full ones
        assert kernels.choose_warpgroups(most, 1, 64, SMS) == 1  # rows for one warpgroup only
        for heads in range(1, 3 * SMS):
            for seqlen in (64, 192, 500, 1024):
                chosen = kernels.choose_warpgroups(most, heads, seqlen, SMS)
                assert 1 <= chosen <= most
                # Where even the smallest tiles leave multiprocessors idle, they end soonest.
                if heads * -(-seqlen // 64) <= SMS:
                    assert chosen == 1


@pytest.mark.parametrize("row", TABLE)
def test_tile_table_fits_the_machine(row: dict) -> None:
    assert row["block_m"] % 64 == 0 and 64 <= row["block_m"] <= 256
    assert (
        row["block_n"] % 16 == 0 and 16 <= row["block_n"] <= 256
    )  # widths WGMMA takes, as N of QK and K of PV
    assert row["head_dim"] % 64 == 0 and row["head_dim"] <= kernels.MAX_HEAD_DIM
    rows = row["block_m"] + row["kv_stages"] * row["block_n"]
    tiles = rows * row["head_dim"] * row["element_bytes"]
    assert tiles < row["shared_memory"] <= SHARED_MEMORY_OF_A_CTA
    assert row["consumer_warpgroups"] == row["block_m"] // 64
    registers = 128 * row["consumer_warpgroups"] * row["consumer_registers"]
    if row["warp_specialised"]:
        assert row["threads"] == 128 * (row["consumer_warpgroups"] + 1)
        # setmaxnreg takes multiples of 8 from 24 to 240.
        for budget in (row["producer_registers"], row["consumer_registers"]):
            assert budget % 8 == 0 and 24 <= budget <= 240
        registers += 128 * row["producer_registers"]
    assert registers <= REGISTERS_OF_A_CTA
    assert 0 <= row["fma_exp2_octets"] <= 8
    assert row["rescale_threshold"] <= 11  # FP16 P, at most 2**threshold, stays far below 2**16


WALKS = [
    # seqlen_q, seqlen_k, block_m, block_n, group_size
    (1024, 1024, 64, 128, 132),
    (1024, 1024, 128, 128, 132),
    (1000, 3000, 128, 128, 7),
    (3000, 1000, 64, 128, 5),
    (65, 2049, 64, 64, 4),
    (1, 700, 128, 128, 3),
    (4097, 130, 64, 64, 1),
]


def walks_of(problem: tuple[int, ...], causal: bool) -> list[list[tuple[int, int]]]:
    """For every key block its (query block, turn) in the order of its steps."""
    seqlen_q, seqlen_k, block_m, block_n, group = problem
    return [
        kernels.query_walk(n, seqlen_q, seqlen_k, block_m, block_n, causal, group)
        for n in range(-(-seqlen_k // block_n))
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("problem", WALKS)
def test_every_visible_block_is_walked_once(problem: tuple[int, ...], causal: bool) -> None:
    seqlen_q, seqlen_k, block_m, block_n, _ = problem
    for n, walk in enumerate(walks_of(problem, causal)):
        last_rows = [min((m + 1) * block_m, seqlen_q) - 1 for m in range(-(-seqlen_q // block_m))]
        visible = {
            m for m, row in enumerate(last_rows) if not causal or n * block_n <= row + seqlen_k - seqlen_q
        }
        blocks = [m for m, _ in walk]
        # The last block may be walked although only its padding sees the keys.
        assert len(set(blocks)) == len(blocks) and visible <= set(blocks) <= visible | {len(last_rows) - 1}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("problem", WALKS)
def test_turns_number_the_key_blocks_of_a_query_block(problem: tuple[int, ...], causal: bool) -> None:
    turns: dict[int, list[int]] = {}
    for walk in walks_of(problem, causal):
        for m, turn in walk:
            turns.setdefault(m, []).append(turn)
    assert all(sorted(t) == list(range(len(t))) for t in turns.values())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("problem", WALKS)
def test_deterministic_walks_end(problem: tuple[int, ...], causal: bool) -> None:
    """CTAs run at most group_size at a time, in launch order, and each waits for its turns: all finish.

    Causal turns are passed on one step late, as the kernel does.
    """
    walks = walks_of(problem, causal)
    launch = list(reversed(range(len(walks)))) if causal else list(range(len(walks)))
    added: dict[int, int] = {}
    running: dict[int, int] = {}  # key block -> its step
    while launch or running:
        while launch and len(running) < problem[4]:
            running[launch.pop(0)] = 0
        moved = False
        for n in list(running):
            walk, step = walks[n], running[n]
            if step < len(walk):
                m, turn = walk[step]
                if added.get(m, 0) != turn:
                    continue
                running[n] += 1
                passed = walk[step - 1][0] if causal else m
                if not causal or step > 0:
                    added[passed] = added.get(passed, 0) + 1
            else:
                if causal and walk:
                    added[walk[-1][0]] = added.get(walk[-1][0], 0) + 1
                del running[n]
            moved = True
        assert moved, "every running key block waits for another"
