"""Tensors that come in buckets become one push: all of them, or nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import Closed, ConfigError, DuplicateTensor, IntegrityError, MissingTensor
from tests.conftest import tiny_qwen2
from tests.push.lora_rig import LoraRig, stir, wrap
from tests.push.rig import Rig, drift


def buckets(pairs: list[tuple[str, Any]], size: int = 3) -> Iterator[list[tuple[str, Any]]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def test_buckets_that_reuse_their_storage_become_one_version(rig: Rig) -> None:
    rig.step()
    with rig.b.collect(version=7) as push:
        for bucket in buckets(rig.named()):
            staged = [(name, tensor.clone()) for name, tensor in bucket]
            push.add(staged)
            for _, tensor in staged:
                tensor.zero_()
        assert rig.b.status().committed is None
    assert push.receipt is not None
    assert (push.receipt.version, push.receipt.verified) == (7, True)
    assert drift(rig.engine, rig.model) < 1e-3


def test_a_stream_is_read_one_tensor_at_a_time(rig: Rig) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in rig.named():
            assert sum(ref() is not None for ref in alive) <= 1
            gathered = tensor.clone()
            alive.append(weakref.ref(gathered))
            yield name, gathered
            del gathered

    with rig.b.collect() as push:
        push.add(stream())
    assert push.receipt is not None
    assert push.receipt.verified is True


def test_a_block_that_raises_is_no_push(rig: Rig) -> None:
    before = rig.seen()
    rig.step()

    def breaks() -> Iterator[tuple[str, torch.Tensor]]:
        yield from rig.named()[:4]
        raise ZeroDivisionError

    push = rig.b.collect()
    with pytest.raises(ZeroDivisionError), push:
        push.add(breaks())
    assert push.receipt is None
    assert rig.seen().same(before)
    assert rig.push().verified is True
    with pytest.raises(Closed, match=r"push\.add"):
        push.add(rig.named())


def test_what_is_wrong_with_the_whole_is_said_at_the_end(rig: Rig) -> None:
    before = rig.seen()
    rig.step()
    with pytest.raises(MissingTensor), rig.b.collect() as push:
        push.add(rig.named()[:-2])
    with pytest.raises(DuplicateTensor), rig.b.collect() as push:
        push.add([*rig.named(), rig.named()[0]])
    assert rig.seen().same(before)


def test_a_bad_bucket_adds_nothing_and_the_block_may_go_on(rig: Rig) -> None:
    rig.step()
    with rig.b.collect() as push:
        with pytest.raises(IntegrityError, match="meta"):
            push.add([rig.named()[0], ("model.norm.weight", torch.ones(48, device="meta"))])
        with pytest.raises(ConfigError, match="item 1"):
            push.add([rig.named()[0], "no pair"])  # type: ignore[list-item]
        push.add(rig.model.named_parameters())
    assert push.receipt is not None
    assert push.receipt.verified is True


def test_buckets_of_a_subset(rig: Rig) -> None:
    assert rig.push().verified is True
    rig.step()
    with rig.b.collect(partial=True) as push:
        for bucket in buckets([(n, p) for n, p in rig.named() if ".mlp." in n], size=1):
            push.add(bucket)  # one at a time, a fused layer in pieces
    assert push.receipt is not None
    assert push.receipt.verified is True


@pytest.mark.parametrize("tied", [False, True])
def test_tied_names_in_different_buckets(tmp_path: Path, tied: bool) -> None:
    model = tiny_qwen2(tied=tied)
    model.save_pretrained(tmp_path)
    rig = Rig(tmp_path, model)
    try:
        rig.step()
        with rig.b.collect() as push:
            for pair in model.state_dict().items():
                push.add([pair])
        assert push.receipt is not None
        assert push.receipt.verified is True
        assert drift(rig.engine, rig.model) < 1e-3
    finally:
        rig.close()


@pytest.mark.parametrize("mode", ["adapter", "merged", "base"])
def test_buckets_of_a_model_with_lora(tmp_path: Path, mode: str) -> None:
    base = tiny_qwen2()
    base.save_pretrained(tmp_path)
    rig = LoraRig(tmp_path, wrap(base))
    try:
        for seed in range(2):
            stir(rig.model, seed=seed)
            with rig.b.collect(mode=mode) as push:
                for bucket in buckets(list(rig.model.named_parameters())):
                    push.add(bucket)
            assert push.receipt is not None
            assert push.receipt.verified is True
    finally:
        rig.close()


def test_of_a_closed_bridge(rig: Rig) -> None:
    rig.b.close()
    with pytest.raises(Closed), rig.b.collect() as push:
        push.add(rig.named())
