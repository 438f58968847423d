"""Models that see images, into engines that were started for text alone and into engines that serve images."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import bridge
from bridge.errors import IntegrityError
from tests.families import perturb
from tests.multimodal import SEEING, make_seeing
from tests.rigs import PROMPTS, difference
from tests.vllm.rig import said_by, start
from trainer_side.reference import reference_logprobs

pytestmark = pytest.mark.timeout(300)
NOISE = 0.03
REAL_TORCHVISION = importlib.util.find_spec("torchvision") is not None


def _dummy_torchvision() -> None:
    """Let vLLM import its models that see where torchvision is not installed; they cannot be shown images then."""
    place = Path(__file__).parents[1] / "sglang" / "shims" / "torchvision"
    spec = importlib.util.spec_from_file_location(
        "torchvision", place / "__init__.py", submodule_search_locations=[str(place)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["torchvision"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


class Seeing:
    """An engine over a checkpoint of a model that sees, the model, and a bridge from one into the other."""

    def __init__(self, family: str, images: int) -> None:
        if not REAL_TORCHVISION and "torchvision" not in sys.modules:
            _dummy_torchvision()
        self.folder = Path(tempfile.mkdtemp(prefix="weighbridge-seeing-"))
        self.model, self.processor, self.prompt = make_seeing(family, self.folder)
        limits = {"image": images} | ({"video": 0} if family == "qwen2.5-vl" else {})
        self.llm = start(
            self.folder, "inproc", skip_tokenizer_init=False, limit_mm_per_prompt=limits, mm_processor_cache_gb=0
        )
        self.images, self.seed = images, 0

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def step(self) -> None:
        self.seed += 1
        perturb(self.model, self.seed)

    def off(self) -> float:
        """Mean |difference| in nats to transformers, on text."""
        return difference(said_by(self.llm), reference_logprobs(self.model, PROMPTS))

    def off_on_an_image(self) -> float:
        """The same on an image and the words after it."""
        import numpy as np
        from PIL import Image
        from vllm import SamplingParams

        image = Image.fromarray((np.random.default_rng(0).random((112, 112, 3)) * 255).astype("uint8"))
        asked = {"prompt": self.prompt, "multi_modal_data": {"image": image}}
        sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        (out,) = self.llm.generate([asked], sampling, use_tqdm=False)
        got = [next(iter(row.values())).logprob for row in out.prompt_logprobs[1:]]
        inputs = self.processor(text=[self.prompt], images=[image], return_tensors="pt")
        # vLLM's attention on CPU is causal over images too
        inputs.pop("token_type_ids", None)
        given = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in inputs.items()}
        with torch.no_grad():
            rows = self.model(**given).logits[0].float().log_softmax(-1)
        ids = inputs["input_ids"][0]
        assert ids.tolist() == out.prompt_token_ids
        return difference([got], [rows[:-1].gather(1, ids[1:, None])[:, 0].tolist()])


WAYS = [(family, images) for family in SEEING for images in ((0, 1) if REAL_TORCHVISION else (0,))]


@pytest.fixture(scope="module", params=WAYS, ids=[f"{family}-{'images' if n else 'text'}" for family, n in WAYS])
def engine(request: pytest.FixtureRequest) -> Iterator[Seeing]:
    made = Seeing(*request.param)
    yield made
    made.close()


def towers(engine: Seeing) -> set[str]:
    return {n for n, _ in engine.model.named_parameters() if "language_model" not in n and "lm_head" not in n}


def test_all_of_it_is_pushed(engine: Seeing) -> None:
    """Text and, where the engine sees, images are answered as by transformers; what the engine was started without is
    listed, and does not travel."""
    with bridge.attach(engine.llm, model=engine.model) as b:
        for _ in range(2):
            engine.step()
            assert engine.off() > 2 * NOISE, "the step must show"
            receipt = b.push(engine.model.named_parameters())
            assert receipt.verified is True
            assert receipt.engines[0].canary is not None
            assert engine.off() < NOISE
            unused = receipt.unused.get(receipt.engines[0].id, ())
            if engine.images:
                assert engine.off_on_an_image() < NOISE
                behind = ("vision_model.encoder.layers.2.", "vision_model.post_layernorm.")
                assert all(any(part in name for part in behind) for name in unused), "LLaVA looks no further"
            else:
                assert len(unused) == len(towers(engine))
            assert b.arena is not None
            assert not b.arena.manifest.by_name.keys() & set(unused)


def test_a_tower_alone(engine: Seeing) -> None:
    if not engine.images:
        pytest.skip("this engine has none")
    with bridge.attach(engine.llm, model=engine.model) as b:
        b.push(engine.model.named_parameters())
        named = [(n, p) for n, p in engine.model.named_parameters() if n in towers(engine)]
        with torch.no_grad():
            for _, parameter in named:
                parameter.mul_(1.5)
        assert engine.off_on_an_image() > 2 * NOISE, "the step must show"
        assert b.push(named, partial=True).verified is True
        assert engine.off_on_an_image() < NOISE


def test_unbound_a_placeholder_is_enough(engine: Seeing) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    if engine.images:
        pytest.skip("it has the tower itself")
    engine.step()
    with bridge.attach(engine.llm) as b:
        receipt = b.push(revert_weight_conversion(engine.model, engine.model.state_dict()))
        assert receipt.verified is True
        assert len(receipt.unused[receipt.engines[0].id]) == len(towers(engine))
    assert engine.off() < NOISE


@pytest.mark.parametrize("bound", [True, False])
def test_a_language_model_in_another_namespace_is_refused(engine: Seeing, bound: bool) -> None:
    from transformers.core_model_loading import revert_weight_conversion

    named = revert_weight_conversion(engine.model, engine.model.state_dict())
    moved = {n.replace("layers.0.mlp", "tower.layers.0.mlp"): t for n, t in named.items()}
    with bridge.attach(engine.llm, model=engine.model if bound else None) as b, pytest.raises(IntegrityError):
        b.push(moved)
    assert engine.off() < 1, "it serves what it did"
