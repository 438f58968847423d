"""Watch that the modules to which a plan was bound still hang in the live tree, before every load and every check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import is_

from torch import nn


@dataclass(frozen=True)
class Replaced:
    """A place of the live tree that has another module than when the plan was made, or none."""

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


class BoundModules:
    """The links from a live root to every module of `bound`, by all paths. Walks the tree once, then compares objects.

    Holds the modules, so that their ids stay unique.
    """

    def __init__(self, root: nn.Module, bound: Iterable[nn.Module]) -> None:
        self._bound = {id(module): module for module in bound}
        self._walk(root)

    def _walk(self, root: nn.Module) -> None:
        self._root = root
        self._places: list[tuple[dict[str, nn.Module | None], str]] = []
        self._children: list[nn.Module] = []
        self._paths: list[str] = []
        self._leads: dict[int, bool] = {}
        self._follow(root, "")

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
                self._places.append((module._modules, name))
                self._children.append(child)
                self._paths.append(below)
        self._leads[id(module)] = leads
        return leads

    def replaced(self, root: nn.Module) -> list[Replaced]:
        """List the modules that no longer hang where they did, `root` itself included. About 60 ns per link.

        A module that was wrapped still hangs below its wrapper and is not listed.
        """
        now = [children.get(name) for children, name in self._places]
        if root is self._root and all(map(is_, now, self._children)):
            return []
        places = [("", self._root, root), *zip(self._paths, self._children, now, strict=True)]
        found = [
            Replaced(path, before, after)
            for path, before, after in places
            if after is not before and (after is None or all(module is not before for module in after.modules()))
        ]
        if not found:
            self._walk(root)
        return found

    def below(self, replaced: Iterable[Replaced]) -> set[int]:
        """Collect the ids of the bound modules that hang, or hung, below the replaced ones."""
        return {id(m) for each in replaced for m in each.before.modules() if id(m) in self._bound}
