"""`rotary_embedding` in plain torch, in place of the kernel of vLLM or sgl_kernel that SGLang calls on CPU."""

import torch


def rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox):
    """Rotate query and key in place; `cos_sin_cache` is [positions, rotated], cosines in its first half."""
    width = cos_sin_cache.shape[-1]
    turned = cos_sin_cache[positions.flatten()].float()
    cos, sin = turned[:, None, : width // 2], turned[:, None, width // 2 :]
    for tensor in (query, key):
        if tensor is None:
            continue
        heads = tensor.view(tensor.shape[0], -1, head_size)
        part = heads[..., :width].float()
        if is_neox:
            a, b = part[..., : width // 2], part[..., width // 2 :]
            out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        else:
            a, b = part[..., 0::2], part[..., 1::2]
            out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        heads[..., :width] = out.to(heads.dtype)
