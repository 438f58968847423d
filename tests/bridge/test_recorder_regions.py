"""`follow` and `compose` against an oracle that enumerates indices."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.model.regions import Region, compose, dense, follow


def addresses(region: Region) -> list[int]:
    """Storage index of each element, row-major over the region's shape."""
    return [
        region.offset + sum(i * s for i, s in zip(index, region.strides, strict=True))
        for index in itertools.product(*map(range, region.shape))
    ]


@st.composite
def held_regions(draw: st.DrawFn) -> Region:
    """A window of a permuted dense tensor: nested strides, with gaps."""
    full = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    order = draw(st.permutations(range(len(full))))
    base = dense([full[k] for k in order])
    strides = [0] * len(full)
    for position, k in enumerate(order):
        strides[k] = base.strides[position]
    offset, shape, steps = draw(st.integers(0, 5)), [], []
    for size, stride in zip(full, strides, strict=True):
        start = draw(st.integers(0, size - 1))
        step = draw(st.integers(1, 2))
        offset += start * stride
        shape.append(draw(st.integers(1, (size - 1 - start) // step + 1)))
        steps.append(stride * step)
    return Region(offset, tuple(shape), tuple(steps))


@st.composite
def any_region(draw: st.DrawFn, max_dims: int = 4) -> Region:
    """Any window at all, overlapping and broadcast ones included."""
    shape = draw(st.lists(st.integers(1, 5), max_size=max_dims))
    strides = [draw(st.integers(0, 9)) for _ in shape]
    return Region(draw(st.integers(0, 30)), tuple(shape), tuple(strides))


@st.composite
def windows(draw: st.DrawFn) -> tuple[Region, Region]:
    """A held region and a view that is a window of it, or anything."""
    held = draw(held_regions())
    view = draw(any_region()) if draw(st.booleans()) else draw(held_regions())
    return view, held


@settings(max_examples=400, deadline=None)
@given(windows(), st.permutations(range(4)))
def test_follow_agrees_with_enumeration(pair: tuple[Region, Region], order: list[int]) -> None:
    view, held = pair
    ranks = [k for k in order if k < len(held.shape)]
    base = dense([held.shape[k] for k in ranks])
    strides = [0] * len(ranks)
    for position, k in enumerate(ranks):
        strides[k] = base.strides[position]
    origin = Region(7, held.shape, tuple(strides))
    other = Region(100, view.shape, dense(view.shape).strides)
    found = follow(view, other, held, origin)
    assert found is not None
    came_from = dict(zip(addresses(held), addresses(origin), strict=True))
    shown = dict(zip(addresses(other), addresses(view), strict=True))
    inside = [pair for a, b in found.inside for pair in zip(addresses(b), addresses(a), strict=True)]
    outside = [pair for a, b in found.outside for pair in zip(addresses(b), addresses(a), strict=True)]
    assert dict(inside) == {to: came_from[at] for to, at in shown.items() if at in came_from}
    assert dict(outside) == {to: at for to, at in shown.items() if at not in came_from}
    assert len(inside) + len(outside) == len(shown)


def test_compose_gives_one_region_or_none() -> None:
    held, origin = dense((4, 6)), Region(100, (4, 6), (1, 4))
    assert compose(Region(6, (2, 6), (6, 1)), held, origin) == Region(101, (2, 6), (1, 4))
    assert compose(Region(0, (24,), (1,)), held, origin) is None
    assert compose(Region(0, (5, 6), (6, 1)), held, origin) is None
    assert compose(Region(3, (24,), (1,)), Region(3, (4, 6), (6, 1)), dense((4, 6))) == Region(0, (24,), (1,))


def test_a_flattened_transpose_is_folded_into_few_parts() -> None:
    rows, cols = 3000, 500
    transposed = Region(0, (rows, cols), (1, rows))
    found = follow(dense((rows * cols,)), dense((rows * cols,)), dense((rows, cols)), transposed)
    assert found is not None
    assert found.inside == [(transposed, dense((rows, cols)))]


def test_many_parts_give_none_instead_of_hanging() -> None:
    held, transposed = dense((1000, 1000)), Region(0, (1000, 1000), (1, 1000))
    view = Region(0, (100000,), (7,))
    assert follow(view, dense((100000,)), held, transposed, limit=100) is None
