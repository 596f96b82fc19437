"""Partitions and matching against brute force."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tomesd.commands import memory
from tomesd.maths import matching
from tomesd.maths.grid import Grid, Partition, alternate, cell_offsets, every_kth, random_src, shift_of
from tomesd.maths.matching import Windows, match_exact, match_windowed

SIZES = st.integers(1, 23)
STRIDES = st.integers(1, 5)


def brute_force(metric, src, dst, r, allowed=lambda s, d: True):
    """The r pairs of one sample, by a double loop."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best = {}
    for s in src:
        best[s] = max((d for d in dst if allowed(s, d)), key=lambda d: float(unit[s] @ unit[d]))
    order = sorted(src, key=lambda s: -float(unit[s] @ unit[best[s]]))
    return {s: best[s] for s in order[:r]}


def centred(metric):
    """What layer norms leave, which windowed matching compares."""
    return metric - metric.mean(-1, keepdim=True)


def pairs(token_map, b):
    """Who joined whom, read off a map."""
    keep = token_map.keep[b].tolist()
    joined = {n: keep[g] for n, g in enumerate(token_map.index[b].tolist())}
    return {s: d for s, d in joined.items() if s != d}


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, STRIDES, STRIDES, st.integers(0, 9))
def test_grid_has_one_dst_in_each_cell(h, w, sy, sx, seed):
    grid = Grid(h, w, sy, sx)
    offset = cell_offsets(grid.cells, grid.sy * grid.sx, seed)
    partition = grid.partition(grid.dst(offset))
    dst, src = partition.dst[0].tolist(), partition.src[0].tolist()
    assert sorted(dst + src) == list(range(h * w))
    assert len(src) == grid.max_r
    cells = [(d // w // grid.sy, d % w // grid.sx) for d in dst]
    assert cells == [(y, x) for y in range(grid.rows) for x in range(grid.columns)]


@pytest.mark.parametrize(("n", "protected"), [(9, 0), (9, 1), (9, 2), (10, 5), (2, 1), (1, 1)])
def test_alternate_protects_the_first_tokens(n, protected):
    partition = alternate(n, protected)
    assert partition.src[0].tolist() == [i for i in range(n) if i % 2 == 0 and i >= protected]
    assert partition.dst[0].tolist() == [i for i in range(n) if i % 2 == 1 and i >= protected]


def test_every_kth():
    partition = every_kth(11, 3)
    assert partition.dst[0].tolist() == [2, 5, 8]
    assert sorted(partition.src[0].tolist()) == [0, 1, 3, 4, 6, 7, 9, 10]


@pytest.mark.parametrize("protected", [0, 1, 4])
def test_random(protected):
    priority = torch.cat([torch.zeros(1, protected), torch.tensor([[0.3, 0.1, 0.2]])], 1)
    partition = random_src(priority, 2, protected)
    assert partition.src.tolist() == [[protected + 1, protected + 2]]
    assert partition.dst.tolist() == [[protected]]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 9), st.sampled_from([2, 3]), st.integers(0, 999), st.booleans())
def test_exact_matching_is_brute_force(h, w, stride, seed, chunked):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, h * w, 4, generator=generator)
    grid = Grid(h, w, stride, stride)
    r = seed % (grid.max_r + 1)
    partition = grid.partition(grid.dst(cell_offsets(grid.cells, grid.sx * grid.sy, seed)))
    limit, matching.CHUNK = matching.CHUNK, 7 if chunked else matching.CHUNK
    try:
        token_map = match_exact(metric, partition, r)
    finally:
        matching.CHUNK = limit
    for b in range(2):
        want = brute_force(metric[b], partition.src[0].tolist(), partition.dst[0].tolist(), r)
        assert pairs(token_map, b) == want


@settings(max_examples=40, deadline=None)
@given(
    SIZES, SIZES, st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 4, 6, 16]), st.integers(0, 999)
)
def test_windowed_matching_is_brute_force_within_windows(h, w, sy, sx, window, seed):
    metric = torch.randn(2, h * w, 4, generator=torch.Generator().manual_seed(seed))
    grid = Grid(h, w, sy, sx)
    r = seed % (grid.max_r + 1)
    partition = grid.partition(grid.dst(cell_offsets(grid.cells, grid.sx * grid.sy, seed)))
    token_map = match_windowed(metric, Windows.of(grid, window), partition.dst, r)

    def axis(token, dst, stride, cells):
        windows = math.ceil(cells / max(1, window // stride))
        span = math.ceil(cells / windows)
        number = min(token // (span * stride), windows - 1)
        start = min(number * span, cells - span)
        return start <= dst // stride < start + span

    def allowed(s, d):
        return axis(s // w, d // w, grid.sy, grid.rows) and axis(s % w, d % w, grid.sx, grid.columns)

    for b in range(2):
        src, dst = partition.src[0].tolist(), partition.dst[0].tolist()
        want = brute_force(centred(metric)[b], src, dst, r, allowed)
        assert pairs(token_map, b) == want


def test_one_window_is_exact_matching():
    metric = torch.randn(2, 8 * 12, 16)
    grid = Grid(8, 12)
    partition = grid.partition(grid.dst(cell_offsets(grid.cells, 4, 1)))
    exact = match_exact(centred(metric), partition, 40)
    windowed = match_windowed(metric, Windows.of(grid, 99), partition.dst, 40)
    joined = [token_map.keep.gather(1, token_map.index) for token_map in (exact, windowed)]
    assert torch.equal(*joined)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_and_non_finite_tokens_do_not_poison_others(bad, windowed, dtype):
    grid = Grid(8, 8)
    metric = torch.randn(1, 64, 8).to(dtype)
    partition = grid.partition(grid.dst(torch.zeros(1, 1, dtype=torch.int64)))
    at = [int(partition.src[0, 3]), int(partition.dst[0, 5])]
    clean = metric.clone()
    metric[0, at] = bad

    def match(x):
        return (
            match_windowed(x, Windows.of(grid, 4), partition.dst, 20)
            if windowed
            else match_exact(x, partition, 20)
        )

    token_map = match(metric)
    joined = pairs(token_map, 0)
    if bad != 0:
        assert not set(at) & {*joined.keys(), *joined.values()}
        others = [g for g in range(token_map.groups) if int(token_map.keep[0, g]) not in at]
        assert torch.isfinite(token_map.merge(metric)[0, others]).all()
    # Pairs among the other tokens are those that would have been made without the bad ones around.
    reference = pairs(match(clean), 0)
    same = [s for s in joined if s in reference and reference[s] not in at]
    assert len(same) >= (12 if windowed else 14)  # the window of a bad dst merges last
    assert all(joined[s] == reference[s] for s in same)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_however_many_tokens_are_not_finite_the_map_is_sound(windowed, seed):
    metric = torch.randn(2, 64, 8)
    for b in range(2):
        metric[b, torch.randperm(64)[: 8 * (seed % 8 + 1)]] = math.nan
    grid = Grid(8, 8)
    partition = grid.partition(grid.dst(cell_offsets(grid.cells, 4, seed)))
    r = (12, 32, 48)[seed % 3]
    token_map = (
        match_windowed(metric, Windows.of(grid, 4), partition.dst, r)
        if windowed
        else match_exact(metric, partition, r)
    )
    for b in range(2):
        joined = pairs(token_map, b)
        assert len(joined) == r
        assert set(joined) <= set(partition.src[0].tolist())
        assert set(joined.values()) <= set(partition.dst[0].tolist())
        assert token_map.index[b].unique().tolist() == list(range(64 - r))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    metric = (torch.randn(1, 64, 32) * 200).to(dtype)
    grid = Grid(8, 8)
    partition = grid.partition(grid.dst(torch.zeros(1, 1, dtype=torch.int64)))
    half = match_exact(metric, partition, 20)
    full = match_exact(metric.float(), partition, 20)
    assert (half.index == full.index).float().mean() > 0.6


def test_hash_is_stateless_and_spread_evenly():
    state = torch.get_rng_state()
    numbers = cell_offsets(100_000, 4, seed=1, timestep=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(numbers, cell_offsets(100_000, 4, seed=1, timestep=torch.tensor(7)))
    assert torch.equal(numbers, cell_offsets(100_000, 4, seed=1, timestep=torch.tensor(7.0)))
    assert torch.equal(numbers[:, :50], cell_offsets(50, 4, seed=1, timestep=7))
    seeds = (0, 1, 2, -1, -2, 1 << 40, 5, 5 << 32, 5 | 5 << 32)
    drawn = [cell_offsets(100_000, 4, seed, timestep) for seed in seeds for timestep in (0, 7, 8)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert 0.24 < (one == other).float().mean() < 0.26
    assert (numbers[0].bincount() / 100_000 - 0.25).abs().max() < 0.01
    neighbours = (numbers[:, 1:] == numbers[:, :-1]).float().mean()
    assert 0.24 < neighbours < 0.26
    rows = cell_offsets(10, 4, 1, torch.tensor([7, 8]))
    assert torch.equal(rows[:1], cell_offsets(10, 4, 1, 7))
    assert torch.equal(rows[1:], cell_offsets(10, 4, 1, 8))


def test_a_partition_for_each_sample():
    metric = torch.randn(2, 36, 4)
    grid = Grid(6, 6)
    both = grid.partition(grid.dst(cell_offsets(9, 4, 0, torch.tensor([1, 2]))))
    for b in range(2):
        alone = Partition(both.src[b : b + 1], both.dst[b : b + 1])
        for together, single in (
            (match_exact(metric, both, 12), match_exact(metric[b : b + 1], alone, 12)),
            (
                match_windowed(metric, Windows.of(grid, 4), both.dst, 12),
                match_windowed(metric[b : b + 1], Windows.of(grid, 4), alone.dst, 12),
            ),
        ):
            assert torch.equal(together.index[b], single.index[0])


def test_memory_grows_with_the_tokens_not_their_square():
    """At 4K (480 x 272 latents) all similarities at once would take 17 GB in float32."""
    grid = Grid(272, 480)
    partition = grid.partition(grid.dst(cell_offsets(grid.cells, 4, 0)))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, (list, tuple)) else [result]
            largest = max([largest, *(o.numel() for o in outputs if isinstance(o, torch.Tensor))])
            return result

    metric = torch.randn(1, 272 * 480, 8)
    with Watch():
        match_windowed(metric, Windows.of(grid), partition.dst, 60_000)
    assert largest <= 16 * 16 // 4 * metric.shape[1]
    largest = 0
    few = Partition(partition.src[:, :3000], partition.dst)
    with Watch():
        match_exact(metric, few, 1000)
    assert largest <= matching.CHUNK


def test_planning_4k_takes_little_more_than_two_times_the_tokens():
    """Two images of 130,560 tokens, for whose similarities tomesd 0.1.3 needs 25.6 GB."""
    grid = Grid(272, 480)
    dst = grid.dst(cell_offsets(grid.cells, 4, 0))
    metric = torch.randn(2, 272 * 480, 320)
    made = []
    taken = memory.peak(lambda: made.append(match_windowed(metric, Windows.of(grid), dst, 65_280)), "cpu")
    assert made[0].groups == 65_280
    if taken is None:
        pytest.skip("this system does not tell what memory a call takes")
    assert 0.1 < taken * 2**20 / metric.nbytes < 2.3


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
def test_dst_of_a_number_are_compiled_by_inductor():
    """Where all is known at compile time, it reckons with bounds of what it indexes by."""

    def pick(x):
        return x.index_select(0, Grid(8, 8).draws(0).dst(shift_of(500.0))[0])

    x = torch.randn(64)
    assert torch.equal(torch.compile(pick, fullgraph=True)(x), pick(x))
    torch.compiler.reset()
