from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bridge.errors import ProtocolError
from bridge.model.manifest import Shard
from bridge.model.regions import (
    Fill,
    Move,
    RankPlan,
    Region,
    TargetTensor,
    compose,
    cut,
    dense,
    dest_coverage,
    intersect,
    runs_of,
    source_coverage,
    union_gaps,
)

# The oracle lists every element one by one; nothing in it knows about runs.


def elements(region: Region) -> list[int]:
    """Flat index of every element of a region, in its own row-major order."""
    return [
        region.offset + sum(i * s for i, s in zip(index, region.strides, strict=True))
        for index in itertools.product(*(range(n) for n in region.shape))
    ]


def box(shape: tuple[int, ...], starts: tuple[int, ...], sizes: tuple[int, ...]) -> Region:
    """The region of a slice of a dense tensor."""
    whole = dense(shape)
    offset = sum(a * s for a, s in zip(starts, whole.strides, strict=True))
    return Region(offset, sizes, whole.strides)


@st.composite
def slices(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], Region]:
    """A dense shape and a (permuted, sliced) region of it."""
    if shape is None:
        shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    starts = tuple(draw(st.integers(0, n - 1)) for n in shape)
    sizes = tuple(draw(st.integers(0, n - a)) for n, a in zip(shape, starts, strict=True))
    region = box(shape, starts, sizes)
    order = draw(st.permutations(range(len(shape))))
    return shape, Region(region.offset, tuple(region.shape[i] for i in order), tuple(region.strides[i] for i in order))


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """A tensor cut into disjoint boxes that cover it, by repeated halving along random axes."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    boxes = [(tuple(0 for _ in shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(boxes) - 1))
        starts, sizes = boxes[at]
        axis = draw(st.integers(0, len(shape) - 1))
        if sizes[axis] < 2:
            continue
        first = draw(st.integers(1, sizes[axis] - 1))
        low = (starts, tuple(first if i == axis else n for i, n in enumerate(sizes)))
        high = (
            tuple(a + first if i == axis else a for i, a in enumerate(starts)),
            tuple(n - first if i == axis else n for i, n in enumerate(sizes)),
        )
        boxes[at : at + 1] = [low, high]
    return shape, [box(shape, starts, sizes) for starts, sizes in draw(st.permutations(boxes))]


@given(slices())
def test_runs_hold_exactly_the_elements_of_a_region(case: tuple[tuple[int, ...], Region]) -> None:
    runs = runs_of(case[1])
    listed = [e for start, end in runs.tolist() for e in range(start, end)]
    assert listed == sorted(elements(case[1]))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(runs.tolist()))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_runs_of_any_strides_agree_with_the_oracle_or_are_refused(sizes: list[int], data: st.DataObject) -> None:
    strides = tuple(data.draw(st.integers(0, 9)) for _ in sizes)
    region = Region(data.draw(st.integers(0, 5)), tuple(sizes), strides)
    wanted = sorted(elements(region))
    try:
        runs = runs_of(region)
    except ProtocolError:
        assert len(set(wanted)) < len(wanted), "only a region that overlaps itself may be refused"
        return
    assert sorted(e for start, end in runs.tolist() for e in range(start, end)) == wanted


@pytest.mark.parametrize("region", [Region(0, (3,), (0,)), Region(4, (3,), (-1,)), Region(0, (2, 3), (2, 1))])
def test_a_region_that_overlaps_itself_is_refused(region: Region) -> None:
    with pytest.raises(ProtocolError):
        runs_of(region)


@given(st.lists(slices(shape=(4, 5)), max_size=6))
def test_gaps_agree_with_counting_every_element(cases: list[tuple[tuple[int, ...], Region]]) -> None:
    counts = Counter(e for _, region in cases for e in elements(region))
    holes, twice = union_gaps([runs_of(region) for _, region in cases], 20)
    assert holes == 20 - len(counts)
    assert twice == sum(n - 1 for n in counts.values())


@pytest.mark.parametrize("runs", [[[-1, 2]], [[0, 21]], [[0, 2], [19, 22]]])
def test_runs_outside_the_tensor_are_refused(runs: list[list[int]]) -> None:
    with pytest.raises(ProtocolError):
        union_gaps([np.array(runs, dtype=np.int64)], 20)


def _plan(shape: tuple[int, ...], regions: list[Region]) -> RankPlan:
    moves = tuple(Move(f"t{i}", dense(r.shape), "m.w", r) for i, r in enumerate(regions))
    return RankPlan((TargetTensor("m.w", "fp32", shape),), moves)


@given(partitions())
def test_a_partition_covers_exactly_once(case: tuple[tuple[int, ...], list[Region]]) -> None:
    assert dest_coverage(_plan(*case)).complete


@given(partitions(), st.data())
def test_a_dropped_piece_is_a_hole_of_its_size(case: tuple[tuple[int, ...], list[Region]], data: st.DataObject) -> None:
    shape, regions = case
    gone = regions.pop(data.draw(st.integers(0, len(regions) - 1)))
    assert dest_coverage(_plan(shape, regions)).holes == {"m.w": gone.numel}


@given(partitions(), st.data())
def test_a_repeated_piece_is_an_overlap_of_its_size(
    case: tuple[tuple[int, ...], list[Region]], data: st.DataObject
) -> None:
    shape, regions = case
    again = data.draw(st.sampled_from(regions))
    coverage = dest_coverage(_plan(shape, [*regions, again]))
    assert coverage.overlaps == {"m.w": again.numel}
    assert not coverage.holes


def test_equal_counts_do_not_hide_a_shifted_piece() -> None:
    # 8 elements written into 8: counting would pass
    coverage = dest_coverage(_plan((8,), [Region(0, (4,), (1,)), Region(3, (4,), (1,))]))
    assert coverage.holes == {"m.w": 1}
    assert coverage.overlaps == {"m.w": 1}


def test_fills_count_as_writes_and_computed_targets_are_left_out() -> None:
    target = TargetTensor("m.w", "fp32", (4, 2))
    moves = (Move("t", dense((3, 2)), "m.w", dense((3, 2))),)
    assert not dest_coverage(RankPlan((target,), moves)).complete
    assert dest_coverage(RankPlan((target,), moves, (Fill("m.w", Region(6, (1, 2), (2, 1)), 0.0),))).complete
    assert dest_coverage(RankPlan((target,), moves, computed={"m.w": "why"})).complete
    # nothing is known of its neighbours in the module
    assert not dest_coverage(RankPlan((target,), moves, computed={"m.v": "why"})).complete


def test_an_empty_target_needs_no_write() -> None:
    assert dest_coverage(RankPlan((TargetTensor("m.w", "fp32", (0, 4)),), ())).complete


def test_a_move_to_an_unknown_target_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"m\.other"):
        dest_coverage(RankPlan((), (Move("t", dense((2,)), "m.other", dense((2,))),)))


def test_a_move_between_different_shapes_is_refused() -> None:
    plan = RankPlan((TargetTensor("m.w", "fp32", (4,)),), (Move("t", dense((2, 2)), "m.w", dense((4,))),))
    with pytest.raises(ProtocolError, match=r"m\.w"):
        dest_coverage(plan)


def test_a_region_whose_strides_do_not_fit_its_shape_is_refused() -> None:
    with pytest.raises(ProtocolError):
        runs_of(Region(0, (2, 2), (1,)))


@given(st.lists(slices(shape=(4, 5)), max_size=5))
def test_source_coverage_counts_only_what_nobody_reads(cases: list[tuple[tuple[int, ...], Region]]) -> None:
    read = {e for _, region in cases for e in elements(region)}
    holes = source_coverage({"t": 20, "empty": 0}, [("t", region) for _, region in cases])
    assert holes == ({"t": 20 - len(read)} if len(read) < 20 else {})


def test_a_source_region_of_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ProtocolError, match="ghost"):
        source_coverage({"t": 4}, [("ghost", dense((4,)))])


@st.composite
def shards(draw: st.DrawFn, shape: tuple[int, ...]) -> Shard:
    offsets = tuple(draw(st.integers(0, n)) for n in shape)
    return Shard(shape, offsets, tuple(draw(st.integers(0, n - a)) for n, a in zip(shape, offsets, strict=True)))


def _indices(shard: Shard) -> set[tuple[int, ...]]:
    return set(itertools.product(*(range(a, a + n) for a, n in zip(shard.offsets, shard.shape, strict=True))))


@given(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.data())
def test_intersect_is_the_common_index_set(shape: tuple[int, ...], data: st.DataObject) -> None:
    a, b = data.draw(shards(shape)), data.draw(shards(shape))
    common = intersect(a, b)
    assert (_indices(common) if common else set()) == _indices(a) & _indices(b)
    assert common == intersect(b, a)


def test_shards_of_different_tensors_do_not_meet() -> None:
    with pytest.raises(ProtocolError):
        intersect(Shard((4,), (0,), (4,)), Shard((5,), (0,), (4,)))


@given(st.integers(0, 200), st.integers(1, 50))
def test_chunks_follow_each_other_to_the_end(nbytes: int, chunk: int) -> None:
    pieces = list(cut(nbytes, chunk))
    assert [b for start, end in pieces for b in range(start, end)] == list(range(nbytes))
    assert all(0 < end - start <= chunk for start, end in pieces)


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ProtocolError):
        list(cut(10, 0))


@settings(max_examples=400)
@given(slices(), st.data())
def test_compose_follows_every_element(case: tuple[tuple[int, ...], Region], data: st.DataObject) -> None:
    """`held` lies at `origin` element for element; whatever compose answers must agree with that map."""
    _, held = case
    assume(held.numel)
    order = data.draw(st.permutations(range(len(held.shape))))
    plain = dense(tuple(held.shape[i] for i in order), data.draw(st.integers(0, 7)))
    strides = [0] * len(order)
    for position, axis in enumerate(order):
        strides[axis] = plain.strides[position]
    origin = Region(plain.offset, held.shape, tuple(strides))
    where = dict(zip(elements(held), elements(origin), strict=True))
    view = data.draw(views_of(held))
    found = compose(view, held, origin)
    shown = elements(view)
    if any(e not in where for e in shown):
        assert found is None or not shown
        return
    if found is not None:
        assert found.shape == view.shape
        assert elements(found) == [where[e] for e in shown]


@st.composite
def views_of(draw: st.DrawFn, held: Region) -> Region:
    """A slice of the held region, sometimes pushed outside of it or given other strides."""
    starts = tuple(draw(st.integers(0, n - 1)) for n in held.shape)
    sizes = tuple(draw(st.integers(0, n - a + 1)) for n, a in zip(held.shape, starts, strict=True))
    offset = held.offset + sum(a * s for a, s in zip(starts, held.strides, strict=True)) + draw(st.integers(-1, 1))
    factor = draw(st.sampled_from([1, 1, 1, 2]))
    return Region(max(offset, 0), sizes, tuple(s * factor for s in held.strides))


@given(slices())
def test_compose_of_the_whole_is_the_origin(case: tuple[tuple[int, ...], Region]) -> None:
    _, held = case
    assume(held.numel)
    found = compose(held, held, dense(held.shape, 3))
    assert found is not None
    assert elements(found) == elements(dense(held.shape, 3))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_compose_follows_a_slice_of_a_reshaped_view(rows: int, columns: int, data: st.DataObject) -> None:
    """A flat view of a contiguous clone, then a slice of it: still affine in the original."""
    held, origin = dense((rows, columns), 5), dense((rows, columns), 2)
    start = data.draw(st.integers(0, rows * columns - 1))
    size = data.draw(st.integers(1, rows * columns - start))
    found = compose(Region(5 + start, (size,), (1,)), held, origin)
    assert found is not None
    assert elements(found) == list(range(2 + start, 2 + start + size))


@given(st.lists(st.integers(0, 4), max_size=4).map(tuple))
def test_dense_is_row_major(shape: tuple[int, ...]) -> None:
    assert elements(dense(shape, 3)) == list(range(3, 3 + math.prod(shape)))
    assert all(stride >= 1 for stride in dense(shape).strides)
