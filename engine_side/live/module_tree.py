"""Do the modules that a plan was bound to still hang in the live tree? Asked before every load and every look."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import is_

from torch import nn


@dataclass(frozen=True)
class Replaced:
    """Where the live tree has another module than when the plan was made, or none."""

    path: str
    before: nn.Module
    after: nn.Module | None

    @property
    def expected(self) -> str:
        return f"{type(self.before).__name__} at {id(self.before):#x}, which the plan writes to"

    @property
    def got(self) -> str:
        if self.after is None:
            return "no module"
        return f"{type(self.after).__name__} at {id(self.after):#x}, which no plan knows"


@dataclass(frozen=True, slots=True)
class _Link:
    """One hop of the tree; `path` is the first name of the child. The child is held, so its id stays its own."""

    children: dict[str, nn.Module | None]
    name: str
    child: nn.Module
    path: str


class BoundModules:
    """The links from `root` to every module of `bound`, by all paths. Walks the tree once, then compares objects."""

    def __init__(self, root: nn.Module, bound: Iterable[nn.Module]) -> None:
        self._bound = {id(module): module for module in bound}
        self._take(root)

    def _take(self, root: nn.Module) -> None:
        self._root = root
        self._links: list[_Link] = []
        self._leads: dict[int, bool] = {}
        self._follow(root, "")
        self._registries = [(link.children, link.name) for link in self._links]
        self._children = [link.child for link in self._links]

    def _follow(self, module: nn.Module, path: str) -> bool:
        """Note the links below `module`; True when it is bound or one of them leads to a bound module."""
        known = self._leads.get(id(module))
        if known is not None:
            return known
        leads = self._leads[id(module)] = id(module) in self._bound
        for name, child in module._modules.items():
            below = f"{path}.{name}" if path else name
            if child is not None and self._follow(child, below):
                leads = True
                self._links.append(_Link(module._modules, name, child, below))
        self._leads[id(module)] = leads
        return leads

    def replaced(self, root: nn.Module) -> list[Replaced]:
        """What hangs elsewhere than it did, `root` itself included; empty in the steady state, at about 60 ns per link.

        A module that was wrapped still hangs below what took its place, and is none of these.
        """
        now = [children.get(name) for children, name in self._registries]
        if root is self._root and all(map(is_, now, self._children)):
            return []
        pairs = [("", self._root, root), *((a.path, a.child, b) for a, b in zip(self._links, now, strict=True))]
        found = [Replaced(path, before, after) for path, before, after in pairs if not _holds(after, before)]
        if not found:
            self._take(root)
        return found

    def below(self, replaced: Iterable[Replaced]) -> set[int]:
        """Ids of the bound modules that hang, or hung, below what was replaced."""
        return {id(m) for each in replaced for m in each.before.modules() if id(m) in self._bound}


def _holds(after: nn.Module | None, before: nn.Module) -> bool:
    return after is before or (after is not None and any(module is before for module in after.modules()))
