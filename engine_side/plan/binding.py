"""Bind a skeleton to the live model: find the live module of each skeleton module by its path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from bridge.errors import ConfigError


def bind(skeleton: nn.Module, live: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Find the live module of every skeleton path, walking through any chain of `base_layer` wrappers at each hop.

    Raises ConfigError, naming the path and the live class, where a hop is missing. Does not compare the names that the
    modules hold: post-load may have taken some away.
    """
    return {path: find_live(skeleton, live, path) for path in paths}


def find_live(skeleton: nn.Module, live: nn.Module, path: str) -> nn.Module:
    """Find the live counterpart of the skeleton module at `path`, without its wrappers."""
    here, there = skeleton, unwrap(live, skeleton)
    walked: list[str] = []
    for hop in path.split(".") if path else ():
        here = here.get_submodule(hop)
        child = there._modules.get(hop)
        if child is None:
            raise ConfigError(
                "the live model has no such module",
                where=path,
                expected=f"{type(here).__name__} at {'.'.join([*walked, hop])}",
                got=f"{type(there).__name__} with {', '.join(there._modules) or 'no children'}",
                remedy="start the engine anew, and attach before anything exchanges its modules",
            )
        there = unwrap(child, here)
        walked.append(hop)
    return there


def side_by_side(skeleton: nn.Module, live: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Walk two trees at once: (path, skeleton module, its live counterpart without wrappers), each live module once.

    Modules that only one of the trees has are left out.
    """
    seen: set[int] = set()
    todo = [("", skeleton, unwrap(live, skeleton))]
    while todo:
        path, here, there = todo.pop()
        if id(there) in seen:
            continue
        seen.add(id(there))
        yield path, here, there
        for hop, child in here._modules.items():
            found = there._modules.get(hop)
            if child is not None and found is not None:
                todo.append((f"{path}.{hop}" if path else hop, child, unwrap(found, child)))


def unwrap(live: nn.Module, skeleton: nn.Module) -> nn.Module:
    """Unwrap `live`; a skeleton module with a `base_layer` of its own is walked into by name instead."""
    while "base_layer" not in skeleton._modules:
        inner = live._modules.get("base_layer")
        if inner is None:
            return live
        live = inner
    return live
