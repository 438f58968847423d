"""Log-probabilities agree with transformers for every family, layout and number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bridge.errors import ConfigError, MissingTensor, NotFound, ShapeMismatch, UnexpectedTensor
from engine_side.embedded.config import LAYOUTS, EngineConfig
from engine_side.embedded.engine import Engine
from engine_side.embedded.parallel import Parallel
from engine_side.embedded.runner import ModelRunner
from tests.engine_side import embedded_models as tiny

FP32, BF16 = 1e-4, 0.02


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layout_agrees_with_transformers_in_fp32(tmp_path: Path, family: str, tied: bool) -> None:
    wanted = tiny.reference_logprobs(tiny.save(tmp_path, family, tied), tiny.prompts())
    for layout in LAYOUTS:
        for wrap in (False, True):
            runner = ModelRunner(EngineConfig(str(tmp_path), layout=layout, wrap_linears=wrap), Parallel())
            difference = tiny.mean_difference(runner.prompt_logprobs(tiny.prompts()), wanted)
            assert difference < FP32, (layout, wrap)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bf16_agrees_with_transformers(tmp_path: Path, family: str) -> None:
    wanted = tiny.reference_logprobs(tiny.save(tmp_path, family, True, torch.bfloat16), tiny.prompts())
    for layout in LAYOUTS:
        runner = ModelRunner(EngineConfig(str(tmp_path), layout=layout), Parallel())
        assert runner.limits.dtype is torch.bfloat16
        assert tiny.mean_difference(runner.prompt_logprobs(tiny.prompts()), wanted) < BF16, layout


def test_packed_experts_on_two_ranks_agree_with_transformers(tmp_path: Path) -> None:
    """The other families on two ranks are compared where they are pushed to: `tests/push/test_families.py`."""
    wanted = tiny.reference_logprobs(tiny.save(tmp_path, "moe", False, torch.bfloat16), tiny.prompts())
    with Engine(EngineConfig(str(tmp_path), layout="packed", tensor_parallel_size=2, threads=1)) as engine:
        assert tiny.mean_difference(engine.prompt_logprobs(tiny.prompts()), wanted) < BF16


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """A bias that is off by a little is far outside the tolerance."""
    model = tiny.save(tmp_path, "qwen2")
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.k_proj.bias").add_(0.2)
        model.get_parameter("model.layers.1.self_attn.v_proj.bias").add_(0.2)
    runner = ModelRunner(EngineConfig(str(tmp_path)), Parallel())
    wanted = tiny.reference_logprobs(model, tiny.prompts())
    assert tiny.mean_difference(runner.prompt_logprobs(tiny.prompts()), wanted) > 100 * FP32


def test_older_config_spelling_of_rope_gives_the_same(tmp_path: Path) -> None:
    wanted = tiny.reference_logprobs(tiny.save(tmp_path, "llama-biased"), tiny.prompts())
    edit(tmp_path, _old_rope)
    runner = ModelRunner(EngineConfig(str(tmp_path)), Parallel())
    assert tiny.mean_difference(runner.prompt_logprobs(tiny.prompts()), wanted) < FP32


def _old_rope(raw: dict[str, object]) -> None:
    rope = raw.pop("rope_parameters")
    assert isinstance(rope, dict)
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {**rope, "type": rope.pop("rope_type")}


def edit(folder: Path, change: object) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    assert callable(change)
    change(raw)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw.update(architectures=["GPT2LMHeadModel"]), "Qwen3MoeForCausalLM"),
        (lambda raw: raw.update(hidden_act="quick_gelu"), "silu"),
        (lambda raw: raw.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0}), "llama3"),
        (lambda raw: raw.update(use_sliding_window=True, sliding_window=16, layer_types=["sliding_attention"]), "16"),
        (lambda raw: raw.pop("vocab_size"), "vocab_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, change: object, words: str) -> None:
    tiny.save(tmp_path, "qwen2")
    edit(tmp_path, change)
    with pytest.raises(ConfigError, match=words):
        ModelRunner(EngineConfig(str(tmp_path)), Parallel())


def test_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    tiny.save(tmp_path, "llama-biased")  # intermediate size 91
    with pytest.raises(ConfigError, match=r"multiple of 2.*91"):
        ModelRunner(EngineConfig(str(tmp_path), tensor_parallel_size=2), Parallel(0, 2))


def test_unknown_config_values_are_refused(tmp_path: Path) -> None:
    for wrong in ({"layout": "zigzag"}, {"dtype": "int4"}, {"load": "guess"}, {"threads": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            EngineConfig(str(tmp_path), **wrong)  # type: ignore[arg-type]
    with pytest.raises(NotFound, match=r"config\.json"):
        ModelRunner(EngineConfig(str(tmp_path)), Parallel())


def test_a_bad_checkpoint_is_refused_with_the_tensors_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny.save(tmp_path, "moe")
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    expert = "model.layers.0.mlp.experts.4.up_proj.weight"
    query = "model.layers.1.self_attn.q_proj.weight"
    key = query.replace("q_proj", "k_proj")
    cases = [
        (MissingTensor, expert, {k: v for k, v in good.items() if k != expert}),
        (MissingTensor, query, {k: v for k, v in good.items() if k != query}),
        (ShapeMismatch, key, {**good, key: good[key].t().contiguous()}),
        (ShapeMismatch, expert, {**good, expert: good[expert].t().contiguous()}),
        (UnexpectedTensor, "q_proj.weight_scale", {**good, query + "_scale": torch.ones(1)}),
        # q_proj inside a longer segment is not q_proj
        (UnexpectedTensor, "my_q_proj", {**good, query.replace("q_proj", "my_q_proj"): good[query].clone()}),
    ]
    for error, name, tensors in cases:
        save_file(tensors, file)
        with pytest.raises(error, match=name.replace(".", r"\.")):
            ModelRunner(EngineConfig(str(tmp_path)), Parallel())


def test_dummy_weights_need_no_checkpoint_and_are_repeatable(tmp_path: Path) -> None:
    tiny.save(tmp_path, "qwen3")
    (tmp_path / "model.safetensors").unlink()
    a, b = (ModelRunner(EngineConfig(str(tmp_path), load="dummy"), Parallel()) for _ in range(2))
    assert a.prompt_logprobs(tiny.prompts()) == b.prompt_logprobs(tiny.prompts())
