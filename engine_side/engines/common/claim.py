"""Who drives an engine object: a mark in the object's own `__dict__`, so that it lives and dies with the object."""

from __future__ import annotations

from weakref import ref

from bridge.errors import Busy

_KEY = "_weighbridge_claim"


class _Claim(str):
    """The owner's name, which also knows its adapter.

    A string, so that whatever walks a module's attributes passes it by; a copy of it, pickled or deep, is a plain empty
    string: a copied module is another module, which nobody drives.
    """

    _adapter: ref[object]

    def __reduce__(self) -> tuple[type[str], tuple[()]]:
        return str, ()


def take(engine: object, adapter: object, owner: str) -> None:
    """Mark `engine` as driven by `adapter`. Raises Busy while another adapter drives it that was neither closed nor
    collected. Idempotent for the same adapter. Does not block."""
    mine = _Claim(owner)
    mine._adapter = ref(adapter)
    state = vars(engine)
    found = state.setdefault(_KEY, mine)  # one step: of two threads that claim at once only one finds its own
    if found is mine:
        return
    holder = found._adapter() if isinstance(found, _Claim) else None
    if holder is not None and holder is not adapter:
        raise Busy(
            "another bridge drives this engine",
            where=f"{type(engine).__name__}, asked for by bridge {owner!r}",
            expected="one bridge per engine: two of them would weigh one engine against two arenas",
            got=f"it is attached to bridge {str(found)!r}",
            remedy=f"close bridge {str(found)!r} first",
        )
    state[_KEY] = mine


def give_up(engine: object, adapter: object) -> bool:
    """Take the mark off, if it is this adapter's. Does nobody drive the engine now? Idempotent."""
    found = vars(engine).get(_KEY)
    holder = found._adapter() if isinstance(found, _Claim) else None
    if holder is adapter:
        del vars(engine)[_KEY]
    return holder is None or holder is adapter
