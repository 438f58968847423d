"""Marks an engine object as driven by one bridge. The mark lies in the object's own `__dict__` and ends with it."""

from __future__ import annotations

from weakref import ref

from bridge.errors import Busy

_KEY = "_weighbridge_claim"


class _Claim(str):
    """The owner's name, with a weak reference to its driver.

    A string, so that code that walks a module's attributes skips it. A copy, pickled or deep, is a plain empty string:
    a copied module is another module, which nobody drives.
    """

    _driver: ref[object]

    def __reduce__(self) -> tuple[type[str], tuple[()]]:
        return str, ()


def take(engine: object, driver: object, owner: str) -> None:
    """Mark `engine` as driven by `driver`. Idempotent for the same driver. Does not block.

    Raises:
        Busy: another driver claimed it, and was neither closed nor garbage-collected.
    """
    mine = _Claim(owner)
    mine._driver = ref(driver)
    found = vars(engine).setdefault(_KEY, mine)  # one step: of two threads that claim at once only one finds its own
    holder = _driver_of(found)
    if holder is not None and holder is not driver:
        raise busy_error(type(engine).__name__, owner, str(found))
    vars(engine)[_KEY] = mine


def is_others(engine: object, driver: object) -> bool:
    """True while another driver than this one has claimed `engine`."""
    return _driver_of(vars(engine).get(_KEY)) not in (None, driver)


def give_up(engine: object, driver: object) -> None:
    """Remove the mark if it is this driver's. Idempotent."""
    if _driver_of(vars(engine).get(_KEY)) is driver:
        del vars(engine)[_KEY]


def busy_error(engine: str, asked_by: str, held_by: str, process: int | None = None) -> Busy:
    """The error for bridge `asked_by` when bridge `held_by` (of another `process`, if given) drives the engine."""
    return Busy(
        "another bridge drives this engine",
        where=f"{engine}, asked for by bridge {asked_by!r}",
        expected="one bridge per engine: two of them would check one engine against two arenas",
        got=f"it is attached to bridge {held_by!r}" + ("" if process is None else f" of process {process}"),
        remedy=f"close bridge {held_by!r} first",
    )


def _driver_of(mark: object) -> object | None:
    return mark._driver() if isinstance(mark, _Claim) else None
