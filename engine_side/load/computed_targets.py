"""Values of the targets that an engine's loader computes on the way, such as a decay -exp(A_log): no copy out of the
arena describes them, so the loader itself makes them from a version, on a skeleton, and they are copied from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import xxhash

from engine_side.live.inplace import find_tensor
from engine_side.plan.bake import Baked
from engine_side.plan.clusters import Role
from engine_side.plan.experiment_errors import experiment_step
from engine_side.plan.post_load import require_tensor
from engine_side.plan.strategies import StrategyTable
from engine_side.plan.twins import device_of, materialise
from engine_side.protocol import RankHost


class ComputedTargets:
    """The computed targets of one plan, by slot of the arena. One thread at a time; no collective of its own.

    Args:
        host: its loader computes.
        baked, decided: the plan and the strategies found for it.

    Attributes:
        sources: target -> the tensors that it is computed from.
    """

    def __init__(self, host: RankHost, baked: Baked, decided: StrategyTable) -> None:
        self.sources = baked.computed
        self._host, self._decided = host, decided
        self._places: dict[str, tuple[str, str, Role]] = {}
        for cluster in decided.clusters.values():
            for path, names in zip(cluster.paths, cluster.places, strict=True):
                for name, role in names.items():
                    target = cluster.targets[role]
                    if target in self.sources and target == (f"{path}.{name}" if path else name):
                        self._places[target] = (path, name, cluster.roles[role])
        self._wanted = sorted({name for names in self.sources.values() for name in names})
        self._values: dict[int, dict[str, torch.Tensor]] = {}
        self._computed_of: dict[int, bytes] = {}
        self._tensor: Callable[[str, int], torch.Tensor] | None = None

    def map(self, tensor: Callable[[str, int], torch.Tensor]) -> None:
        """Compute from now on of what `tensor` gives for (name, slot), and let go of what was computed before."""
        self._tensor = tensor
        self._values.clear()
        self._computed_of.clear()

    def buffers(self, slot: int) -> Mapping[str, torch.Tensor]:
        """Look up the tensors that `values` fills: always the same ones for a slot."""
        if slot not in self._values:
            self._values[slot] = {
                target: torch.empty_strided(
                    role.shape, role.strides, dtype=role.dtype, device=device_of(self._decided.live[path])
                )
                for target, (path, _, role) in self._places.items()
            }
        return self._values[slot]

    def values(self, slot: int) -> Mapping[str, torch.Tensor]:
        """Compute the canonical values of every computed target from the version that is in a slot now.

        Runs the engine's loader where the sources differ from those of the last call. Raises ConfigError when it fails;
        OutOfMemory.
        """
        if not self.sources or self._tensor is None:
            return {}
        weights = {name: self._tensor(name, slot) for name in self._wanted}
        digest = _digest(weights.values())
        if self._computed_of.get(slot) != digest:
            self._computed_of.pop(slot, None)
            with experiment_step("computing values with the engine's loader", ", ".join(self.sources)):
                self._compute(weights, self.buffers(slot))
            self._computed_of[slot] = digest
        return self.buffers(slot)

    @torch.no_grad()
    def _compute(self, weights: Mapping[str, torch.Tensor], into: Mapping[str, torch.Tensor]) -> None:
        skeleton = self._host.skeleton()
        for path in dict.fromkeys(path for path, _, _ in self._places.values()):
            materialise(skeleton.get_submodule(path), self._decided.live[path], {}, {}, [])
        for path, name, role in self._places.values():  # elements that a partial push leaves alone stay as they are
            live, stored = find_tensor(self._decided.live[path], name), self._decided.choices[path].stored[name]
            if live is not None and stored.readable:
                current, made = stored.side_by_side(live, role.view(require_tensor(skeleton.get_submodule(path), name)))
                made.copy_(current)
        self._host.load_weights(skeleton, iter(weights.items()))
        for target, (path, name, role) in self._places.items():
            into[target].copy_(role.view(require_tensor(skeleton.get_submodule(path), name).detach()))


def _digest(tensors: Iterable[torch.Tensor]) -> bytes:
    hasher = xxhash.xxh3_128()
    for tensor in tensors:
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.digest()
