"""Another thread changes LoRA layers while they are copied and takes the change back: the push is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from peft import LoraConfig

from bridge.errors import IntegrityError
from tests.push.lora_rig import LoraRig, stir
from tests.push.rig import refused
from trainer_side.snapshot.snapshotter import Snapshotter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Make = Callable[..., LoraRig]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture
def make(make: Make) -> Make:
    return partial(make, target_modules=TARGETS)


def _scale(model: Any, factor: float) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(factor)


Change = Callable[[Any], None]


THERE_AND_BACK: dict[str, tuple[Change, Change]] = {
    "disable_adapter": (
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
    ),
    "set_scale": (lambda m: _scale(m, 2.0), lambda m: _scale(m, 0.5)),
    "set_adapter": (lambda m: m.base_model.set_adapter("other"), lambda m: m.base_model.set_adapter("default")),
    "merge": (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()),
}


@pytest.mark.parametrize("again", [False, True], ids=["first push", "as the last one"])
@pytest.mark.parametrize(
    ("mode", "what"),
    [(mode, what) for mode in ("merged", "adapter") for what in THERE_AND_BACK] + [("base", "merge")],
)
def test_a_change_that_is_taken_back_before_the_end_is_seen(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str, what: str, again: bool
) -> None:
    """At both ends of the snapshot the model is set alike; in between every layer was read in another state."""
    rig = make()
    rig.model.add_adapter("other", LoraConfig(r=2, lora_alpha=9, target_modules=TARGETS))
    stir(rig.model, seed=5)
    if again:
        rig.push(mode=mode)
    before = rig.answers()
    there, back = THERE_AND_BACK[what]
    write = Snapshotter.write

    def meanwhile(self: Snapshotter, *given: Any, **options: Any) -> Any:
        there(rig.model)
        try:
            return write(self, *given, **options)
        finally:
            back(rig.model)

    with monkeypatch.context() as patch:
        patch.setattr(Snapshotter, "write", meanwhile)
        with refused(IntegrityError, 5, "LoRA layers changed while they were pushed"):
            rig.b.push(rig.model.named_parameters(), mode=mode, verify="weights")
    assert rig.answers() == before
    if what == "merge":
        rig.push(mode="base")  # unmerging left other bits in the base
    rig.push(mode=mode)
    assert rig.serves(rig.base_truth() if mode == "base" else rig.truth())
