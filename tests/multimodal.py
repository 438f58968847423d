"""Tiny random models that see images, with the processors that engines start from; made from configs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.families import SIZES

VOCABULARY = int(SIZES["vocab_size"])
NEWLINES = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"]


def _tokenizer(*special: str, **named: str) -> Any:
    """Words w0, w1, ... and after them the special ones; `named` are attributes that a processor looks for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{k}" for k in range(VOCABULARY - len(special))]
    known = {word: k for k, word in enumerate([*words, *special])}
    made = Tokenizer(models.WordLevel(known, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    more = {"extra_special_tokens": named} if named else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=list(special), pad_token="w0", bos_token="w1", eos_token="w2",
        **more,
    )  # fmt: skip


def _qwen25_vl() -> tuple[Any, Any, str]:
    import transformers as t

    known = _tokenizer("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    image, video, start, end = range(VOCABULARY - 4, VOCABULARY)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    config = t.Qwen2_5_VLConfig(
        text_config={**SIZES, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 128,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=False,
    )  # fmt: skip
    images = t.Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16)
    processor = t.Qwen2_5_VLProcessor(images, known, t.Qwen2VLVideoProcessor())
    return (
        t.Qwen2_5_VLForConditionalGeneration(config),
        processor,
        "<|vision_start|> <|image_pad|> <|vision_end|> w5 w6",
    )


def _gemma3() -> tuple[Any, Any, str]:
    import transformers as t

    boi, eoi, image = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
    known = _tokenizer(boi, eoi, image, *NEWLINES, boi_token=boi, eoi_token=eoi, image_token=image)
    first = VOCABULARY - 3 - len(NEWLINES)
    config = t.Gemma3Config(
        text_config={**SIZES, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
        vision_config={
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14, "vision_use_head": False,
        },
        mm_tokens_per_image=4, boi_token_index=first, eoi_token_index=first + 1, image_token_index=first + 2,
    )  # fmt: skip
    images = t.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    processor = t.Gemma3Processor(images, known, image_seq_length=4)
    return t.Gemma3ForConditionalGeneration(config), processor, f"{boi} w5 w6"


def _llava() -> tuple[Any, Any, str]:
    """Its engine builds no more layers of the tower than the language model looks at: one less than there are."""
    import transformers as t

    tower = t.CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
        projection_dim=64,
    )  # fmt: skip
    config = t.LlavaConfig(
        text_config=t.LlamaConfig(**{**SIZES, "tie_word_embeddings": False}),
        vision_config=tower, image_token_index=VOCABULARY - 1, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=16,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = t.LlavaProcessor(
        images, _tokenizer("<image>"), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor, "<image> w5 w6"


def _mistral3() -> tuple[Any, Any, str]:
    import transformers as t

    image, rest, end = "[IMG]", "[IMG_BREAK]", "[IMG_END]"
    tower = t.PixtralVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=112, patch_size=14,
        head_dim=16,
    )  # fmt: skip
    config = t.Mistral3Config(
        text_config=t.MistralConfig(**{**SIZES, "head_dim": 32, "tie_word_embeddings": False}),
        vision_config=tower, image_token_index=VOCABULARY - 3, spatial_merge_size=2, vision_feature_layer=-1,
        tie_word_embeddings=False,
    )  # fmt: skip
    images = t.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    processor = t.PixtralProcessor(
        images, _tokenizer(image, rest, end), patch_size=14, spatial_merge_size=2, image_token=image,
        image_break_token=rest, image_end_token=end,
    )  # fmt: skip
    return t.Mistral3ForConditionalGeneration(config), processor, f"{image} w5 w6"


SEEING: Mapping[str, Callable[[], tuple[Any, Any, str]]] = {
    "qwen2.5-vl": _qwen25_vl,
    "gemma3": _gemma3,
    "llava": _llava,
    "mistral3": _mistral3,
}


def make_seeing(family: str, folder: Path, seed: int = 0) -> tuple[Any, Any, str]:
    """Make a bf16 model, its processor and a prompt with one image, and a checkpoint of the first two.

    The checkpoint's names are those of the published ones: transformers >= 5 renames towers that it did not load.
    """
    torch.manual_seed(seed)
    model, processor, prompt = SEEING[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    if family in ("gemma3", "llava"):
        _as_published(folder)
        model = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval(), processor, prompt


def _as_published(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    named = {name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})
