"""What several rooms of the tests share: tiny real models, their checkpoints, engines and bridges."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from engine_side.load import arena_views

hypothesis.settings.register_profile("weighbridge", deadline=None)  # on a busy machine, time says nothing
hypothesis.settings.load_profile("weighbridge")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `--dist loadgroup`, keep the tests of a file in one process, for they share engines and checkpoints.

    All that meet a Ray share one process too, and come first: they take longest.
    """
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        with_ray = item.path.parent.name == "ray" or item.path.name == "test_examples.py"
        item.add_marker(pytest.mark.xdist_group("ray" if with_ray else item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group").args != ("ray",))  # type: ignore[union-attr]


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> Iterator[None]:
    """Two cores are shared by everything that runs here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """`new_folder()` makes an empty folder below pytest's own.

    `tmp_path_factory.mktemp` reads all folders that it has made to number the next: thousands, for every test again.
    """
    parent = tmp_path_factory.mktemp("folders")
    return lambda: Path(tempfile.mkdtemp(dir=parent))


@pytest.fixture(autouse=True)
def _own_state(new_folder: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Journals of a test never meet those of the user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(new_folder()))


@pytest.fixture(scope="session", autouse=True)
def _own_shared_memory() -> Iterator[None]:
    """Arenas of a test session lie in a folder of their own, which has to be empty when it ends."""
    folder = tempfile.mkdtemp(prefix="weighbridge-tests-", dir="/dev/shm")
    before = os.environ.get("WEIGHBRIDGE_SHM_DIR")
    os.environ["WEIGHBRIDGE_SHM_DIR"] = folder
    yield
    left = os.listdir(folder)
    shutil.rmtree(folder)
    os.environ.pop("WEIGHBRIDGE_SHM_DIR")
    if before is not None:
        os.environ["WEIGHBRIDGE_SHM_DIR"] = before
    if left:
        raise AssertionError(f"left in shared memory: {sorted(left)}")


def unlinked_and_held(folder: Path) -> list[str]:
    """Paths of files that are gone from a folder and that this process still has open or mapped."""
    found = [line.partition(" /")[2] for line in Path("/proc/self/maps").read_text().splitlines()]
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them is closed by now
            found.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix("/"))
    gone = (f"/{path}".removesuffix(" (deleted)") for path in found if path.endswith(" (deleted)"))
    return [path for path in gone if Path(path).is_relative_to(folder)]


@pytest.fixture
def small_weights_are_lent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Post-load steps of this process's engines pack tiny weights from the arena's memory, as they do large ones.

    Returns:
        The bytes of each weight that was lent since, for a test to see that any was.
    """
    lent: list[int] = []
    view = arena_views.ArenaViews.view

    def noted(views: arena_views.ArenaViews, tensor: torch.Tensor | None) -> torch.Tensor | None:
        shown = view(views, tensor)
        if shown is not None:
            lent.append(shown.nbytes)
        return shown

    monkeypatch.setattr(arena_views, "LEAST", arena_views.ALIGNED)
    monkeypatch.setattr(arena_views.ArenaViews, "view", noted)
    return lent


def tiny_qwen2(*, tied: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random Qwen2 with awkward sizes: q/k/v biases, grouped KV heads, a vocabulary that needs padding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **{
            "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "tie_word_embeddings": tied, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.to(dtype).eval()


def tiny_qwen3_moe(*, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **{
            "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 24,
            "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "norm_topk_prob": True, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


def perturb(model: Any, seed: int = 1, scale: float = 0.05) -> None:
    """An optimiser's step: every parameter moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_((noise * scale).to(parameter.dtype))


@pytest.fixture(scope="session")
def checkpoint(new_folder: Callable[[], Path]) -> Callable[..., Path]:
    """`checkpoint(model)` saves a model once and gives its folder."""

    def save(model: Any) -> Path:
        folder = new_folder()
        model.save_pretrained(folder)
        return folder

    return save
