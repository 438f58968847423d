"""Errors of an experiment that say nothing about the strategy under test: no memory left, a failing step of the engine.

An experiment may conclude "this strategy does not work" only from what a module answers. Whatever else the engine's
code raises ends the experiment with an error that names the module and the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from bridge.errors import BridgeError, ConfigError, OutOfMemory
from engine_side.plan.loader_errors import LOADER_ERRORS

FOREIGN_ERRORS = (*LOADER_ERRORS, ImportError, MemoryError, OSError)
"""Exceptions that an engine's code raises: LOADER_ERRORS, a kernel that cannot be imported, a host without memory."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Words of torch's allocators (device, host), which raise plain RuntimeErrors in some builds, in lower case."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """True where memory ran out, also when the engine's code has wrapped that in an exception of its own."""
    while error is not None:
        if isinstance(error, (MemoryError, OutOfMemory, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def experiment_step(step: str, module: str, nbytes: int = 0, *, memory_only: bool = False) -> Iterator[None]:
    """Report foreign exceptions inside the block as errors of our tree.

    Args:
        step: a gerund, for the message: "building a twin".
        module: path and class, as far as known.
        nbytes: bytes that the step wants at least; 0 when unknown.
        memory_only: let every exception pass but those of an exhausted memory.

    Raises OutOfMemory, or ConfigError for any other foreign exception. Errors of our tree pass: they say more already.
    """
    try:
        yield
    except FOREIGN_ERRORS as error:
        if isinstance(error, BridgeError):
            raise
        got = f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"memory ran out while {step}",
                where=module,
                expected=f"{nbytes} bytes free for it" if nbytes else "room for a copy of this module's weights",
                got=got,
                remedy="leave the engine less memory for its KV cache (vLLM: gpu_memory_utilization, SGLang: "
                "mem_fraction_static), or end other processes on the device",
            ) from error
        if memory_only:
            raise
        raise ConfigError(
            f"the engine's own code failed while {step}",
            where=module,
            expected="a step that works on a module in the state in which the engine's constructor and loader leave it",
            got=got,
            remedy="load the same checkpoint into this engine to see whether its own start fails alike",
        ) from error
