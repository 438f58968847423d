"""The loader on the real embedded engine: every family, layout, tie and wrapper, one rank and two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import ShapeMismatch
from bridge.model.levels import RANK_LEVELS
from bridge.model.manifest import TensorInfo, lay_out
from bridge.model.regions import source_coverage
from bridge.model.torch_dtypes import dtype_name
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner
from engine_side.engines.embedded import EmbeddedRankHost
from engine_side.load.loader import Loader
from engine_side.load.version_zero import read_back
from engine_side.verify.verify import Verifier
from tests.engine_side import embedded_models as tiny

CASES = [
    ("llama-biased", False, torch.float32),
    ("qwen2", True, torch.float32),
    ("qwen2", False, torch.bfloat16),
    ("qwen3", False, torch.float32),
    ("moe-mixed", False, torch.float32),
    ("moe", True, torch.bfloat16),
]


def state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@contextmanager
def engine(folder: Path, slots: list[dict[str, torch.Tensor]], rank: int = 0, **options: Any) -> Iterator[Any]:
    config = EngineConfig(str(folder), **options)
    host = EmbeddedRankHost(ModelRunner(config, Parallel(rank, config.tensor_parallel_size, 5.0)))
    infos = [TensorInfo(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in slots[0].items()]
    loader = Loader(host, infos, threads=2)
    manifest = lay_out(infos)
    loader.map(manifest, [[slot[s.name] for s in manifest.tensors] for slot in slots])
    try:
        yield host, loader, Verifier(loader)
    finally:
        loader.close()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "tied", "dtype"), CASES)
def test_two_versions(family: str, tied: bool, dtype: torch.dtype, layout: str, wrapped: bool, tmp_path: Path) -> None:
    tiny.save(tmp_path, family, tied, dtype)
    other = tiny.make_model(family, tied, dtype, seed=99)
    other.save_pretrained(tmp_path / "other")
    slots = [state(tmp_path), state(tmp_path / "other")]
    with engine(tmp_path, slots, layout=layout, wrap_linears=wrapped) as (host, loader, verifier):
        objects = {n: (id(p), p.data_ptr()) for n, p in host.model.named_parameters(remove_duplicate=False)}
        assert all(r.ok for r in verifier.run(RANK_LEVELS, 0))
        outcome = loader.apply(1)
        found = verifier.run(RANK_LEVELS, 1, outcome=outcome, previous=0)
        assert all(r.ok for r in found), [r for r in found if not r.ok]
        assert not outcome.rebound
        assert not outcome.created
        assert not verifier.canary_only()
        assert objects == {n: (id(p), p.data_ptr()) for n, p in host.model.named_parameters(remove_duplicate=False)}
        got = host.prompt_logprobs(tiny.prompts())
        limit = 1e-4 if dtype is torch.float32 else 0.02
        assert tiny.mean_difference(got, tiny.reference_logprobs(other, tiny.prompts())) < limit
        assert not all(r.ok for r in verifier.run(RANK_LEVELS, 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2", "moe"])
def test_two_ranks_cover_everything_together(family: str, layout: str, tmp_path: Path) -> None:
    tiny.save(tmp_path, family)
    tiny.make_model(family, seed=99).save_pretrained(tmp_path / "other")
    slots = [state(tmp_path), state(tmp_path / "other")]
    sizes = {n: t.numel() for n, t in slots[0].items()}
    regions: list[Any] = []
    into = {n: torch.zeros_like(t) for n, t in slots[0].items()}
    lost: set[str] = set()
    for rank in (0, 1):
        with engine(tmp_path, slots, rank, layout=layout, tensor_parallel_size=2) as (_, loader, verifier):
            assert all(r.ok for r in verifier.run(RANK_LEVELS, 0))
            outcome = loader.apply(1)
            assert all(r.ok for r in verifier.run(RANK_LEVELS, 1, outcome=outcome, previous=0))
            regions += [(m.tensor, m.source) for m in loader.baked.plan.moves]
            assert loader.baked.read
            assert loader.baked.coverage.complete
            lost |= set(read_back(loader, [into[s.name] for s in loader.mapped.manifest.tensors])[0])
    assert source_coverage(sizes, regions) == {}
    assert all(torch.equal(into[n], slots[1][n]) for n in into if n not in lost)
    assert bool(lost) == (layout == "packed")


def test_a_transposed_tensor_is_refused_with_the_right_shape(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen2")
    config = EngineConfig(str(tmp_path))
    host = EmbeddedRankHost(ModelRunner(config, Parallel(0, 1, 5.0)))
    name = "model.layers.1.self_attn.k_proj.weight"
    infos = [
        TensorInfo(n, "fp32", tuple(reversed(t.shape)) if n == name else tuple(t.shape))
        for n, t in state(tmp_path).items()
    ]
    with pytest.raises(ShapeMismatch) as caught:
        Loader(host, infos).check()
    assert caught.value.names == (name,)
    assert "8, 48" in str(caught.value.expected)
    assert caught.value.remedy == "push its transpose: tensor.mT"
