"""Copy and compare memory by address with libc's memmove and memcmp: faster than torch, and without the GIL.

Also `uncollected`, for work that makes many objects and no garbage.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator

_libc = ctypes.CDLL(None)

memmove: Callable[[int, int, int], object] = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(("memmove", _libc))
"""(to, from, nbytes); releases the GIL."""
memcmp: Callable[[int, int, int], int] = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(("memcmp", _libc))
"""(a, b, nbytes) -> 0 when equal; releases the GIL."""
memcmp_held: Callable[[int, int, int], int] = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
)(("memcmp", _libc))
"""Like memcmp, for a few kilobytes: keeps the GIL, since getting it back can take 5 ms while another thread runs."""


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Suspend cyclic garbage collection, in all threads, while a plan is built: of its many thousand objects all stay,
    and searching them again and again costs as much as the work itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
