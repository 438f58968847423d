"""libc's memmove and memcmp on addresses: faster than a tensor copy or comparison, and other threads run meanwhile.

Also `uncollected`, for work that makes many objects and no garbage.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator

_libc = ctypes.CDLL(None)


def _entry(name: str) -> int:
    return ctypes.cast(getattr(_libc, name), ctypes.c_void_p).value or 0


memmove: Callable[[int, int, int], object] = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(_entry("memmove"))
"""(to, from, nbytes); lets other threads run."""
memcmp: Callable[[int, int, int], int] = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(_entry("memcmp"))
"""(a, b, nbytes) -> 0 when equal; lets other threads run."""
memcmp_held: Callable[[int, int, int], int] = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(_entry("memcmp"))
"""Like memcmp for a few kilobytes: giving up the interpreter lock can cost 5 ms, since another thread may take it for
that long."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic garbage collection inside, in all threads: building a plan of many thousand tensors makes objects that
    stay, and looking through them again and again costs as much as the work itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
