"""The codes and scales of each version in the arena, made on this rank of the values that lie there.

A version is quantised once, when it is first loaded or compared with; what did not change in the arena is not
quantised again. Version 0 is what the engine's checkpoint held: its codes are copied, not made anew, so that putting it
back gives the engine's own bits whatever scheme made them, and so does a later version for what is still as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet

import torch

from bridge.errors import IntegrityError, NonFinite
from bridge.model.torch_dtypes import dtype_of
from bridge.shm.arena import DIGEST_NBYTES, Seal
from engine_side.quantise.checkpoint_form import CheckpointForm, QuantisedWeight

Made = dict[str, torch.Tensor]
"""Tensors of the checkpoint's form that the arena does not hold, by name."""


class QuantisedSlots:
    """Makes what a rank adds to each slot of an arena. Used by one thread at a time.

    Args:
        form: which tensors are quantised, and which are kept.
        used: the names of the checkpoint's form that this rank's plan reads.
        index: announced name -> its place in a slot.
        slots: number of slots.
    """

    def __init__(self, form: CheckpointForm, used: frozenset[str], index: Mapping[str, int], slots: int) -> None:
        self._weights = [weight for name, weight in form.quantised.items() if {name, weight.scales} & used]
        self._index, self._schemes = index, form.schemes
        constant = form.schemes.read([name for name in form.kept if name in used]) if form.schemes else {}
        self.made: list[Made] = [{**_empty(self._weights), **constant} for _ in range(slots)]
        self.kept = tuple(sorted(form.kept))
        self.errors: list[dict[str, float]] = [{} for _ in range(slots)]
        """By slot, weight -> relative error of what its codes stand for against its values; none for version 0."""
        self._of: list[dict[str, bytes]] = [{} for _ in range(slots)]
        """By slot, weight -> the digest of the values for which its codes stand."""
        self._originals: set[int] = set()

    def prepare(self, slot: int, values: Sequence[torch.Tensor], seal_of: Callable[[int], Seal | None]) -> None:
        """Make the codes and scales of a slot fit its values. Called before a slot is loaded or compared with; blocks
        for the weights that changed. `seal_of` reads the seal of a slot.

        Raises NonFinite for values that have no codes; IntegrityError where a code is not the nearest to its value.
        """
        for original in self._originals:
            held = seal_of(original)
            if held is not None and held.version == 0:
                self._of[original] = {weight.name: self._digest(weight, held) for weight in self._weights}
        seal = seal_of(slot)
        if seal is not None and seal.version == 0 and slot in self._originals:
            return
        self._originals.discard(slot)
        done = self._of[slot]
        for weight in self._weights:
            digest = b"" if seal is None else self._digest(weight, seal)
            if digest and done.get(weight.name) == digest:
                continue
            done.pop(weight.name, None)
            alike = [k for k, known in enumerate(self._of) if digest and known.get(weight.name) == digest]
            if alike:
                self._take(weight, alike[0], slot)
            else:
                at = self._index[weight.name]
                self.errors[slot][weight.name] = _quantise(weight, values[at], self.made[slot])
            done[weight.name] = digest

    def _digest(self, weight: QuantisedWeight, seal: Seal) -> bytes:
        at = self._index[weight.name] * DIGEST_NBYTES
        return seal.digests[at : at + DIGEST_NBYTES]

    def _take(self, weight: QuantisedWeight, source: int, slot: int) -> None:
        """Take the codes of equal values from another slot, with their error, if they were made of values."""
        for name in (weight.name, weight.scales):
            self.made[slot][name].copy_(self.made[source][name])
        self.errors[slot].pop(weight.name, None)
        if weight.name in self.errors[source]:
            self.errors[slot][weight.name] = self.errors[source][weight.name]

    def has_originals(self, slot: int) -> bool:
        """Tell if a slot holds the codes and scales of version 0."""
        return slot in self._originals

    def begin_originals(self, slot: int) -> Made:
        """Hand out the codes and scales of a slot, to be filled with those of version 0."""
        self._of[slot].clear()
        self.errors[slot].clear()
        self._originals.add(slot)
        return self.made[slot]

    def fill_originals(self, slot: int, lost: AbstractSet[str]) -> tuple[str, ...]:
        """Fill those of version 0 that the live model no longer shows from the engine's checkpoint; returns the names
        of their weights."""
        wanted = [weight for weight in self._weights if weight.name in lost]
        if self._schemes is not None:
            found = self._schemes.read([name for weight in wanted for name in (weight.name, weight.scales)])
            for name, tensor in found.items():
                self.made[slot][name].copy_(tensor)
        return tuple(weight.name for weight in wanted)

    def original_values(self, slot: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, the values that its codes and scales stand for) of the weights of version 0."""
        for weight in self._weights:
            made = self.made[slot]
            yield weight.name, weight.scheme.dequantise(made[weight.name], made[weight.scales])


def _empty(weights: Sequence[QuantisedWeight]) -> Made:
    out: Made = {}
    for weight in weights:
        for info in (weight.stored.weight, weight.stored.scales):
            out[info.name] = torch.empty(info.shape, dtype=dtype_of(info.dtype))
    return out


def _quantise(weight: QuantisedWeight, sent: torch.Tensor, into: Made) -> float:
    """Quantise one weight into its codes and scales; returns its relative error."""
    values = sent.to(dtype_of(weight.cast))
    if not bool(values.isfinite().all()):
        raise NonFinite(
            "a value that is not finite has no code",
            where=weight.name,
            expected=f"numbers, for codes of {weight.stored.weight.dtype}",
            got="NaN or infinity",
            remedy="leave allow_nonfinite at False for engines with quantised weights",
            names=(weight.name,),
        )
    codes, scales = weight.scheme.quantise(values)
    into[weight.name].copy_(codes)
    into[weight.scales].copy_(scales)
    error, worst = weight.scheme.compare(values, into[weight.name], into[weight.scales])
    if not weight.scheme.within(worst):
        raise IntegrityError(
            "a quantised weight is further from its values than rounding explains",
            where=weight.name,
            expected="each code the nearest to its value",
            got=f"one {worst:.3g} half steps away; relative error of the whole {error:.3g}",
            remedy="push again; if it happens again, check this machine's memory",
            names=(weight.name,),
        )
    return error
