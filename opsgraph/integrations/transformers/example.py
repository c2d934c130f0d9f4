"""A small input for a model, made from its config and its forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import OpsgraphError

TOKENS = 8


def examples(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs that a model may take, the likeliest first."""
    names = inspect.signature(type(model).forward).parameters
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)

    def floats(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    def tokens(config: Any) -> Tensor:
        most = getattr(config, "vocab_size", None) or 100
        low = min(most - 1, 5)
        return torch.randint(low, max(most - 4, low + 1), (1, TOKENS), generator=generator).to(
            device
        )

    options = {"use_cache": False} if "use_cache" in names else {}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    decoder = {"decoder_input_ids": tokens(text)} if "decoder_input_ids" in names else {}
    if "input_ids" in names:
        yield {"input_ids": tokens(text), **decoder, **options}
    if "input_ids" in names and "bbox" in names:
        boxes = {"bbox": floats(1, TOKENS, 4).sigmoid()}
        yield {"input_ids": tokens(text), **boxes, **decoder, **options}
    if "grid_thw" in names:
        named = "spatial_merge_size", "in_channels", "temporal_patch_size", "patch_size"
        merged, channels, depth, size = (int(getattr(config, name, None) or 0) for name in named)
        side, channels = 2 * (merged or 1), channels or int(getattr(config, "num_channels", 3))
        patches = floats(side * side, channels * (depth or 1) * size**2)
        grid = torch.tensor([[1, side, side]], device=device)
        yield {next(name for name in names if name != "self"): patches, "grid_thw": grid}
    if "pixel_values" in names:
        vision = getattr(config, "vision_config", None) or config
        channels = getattr(vision, "num_channels", None) or 3
        size = getattr(vision, "image_size", None) or 32
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        pixels = {"pixel_values": floats(1, channels, high, wide)}
        if "input_ids" in names:
            yield {"input_ids": tokens(text), **pixels, **options}
        yield {**pixels, **decoder, **options}
        frames = getattr(config, "num_frames", None) or 8
        yield {"pixel_values": floats(1, frames, channels, high, wide)}
    for name in ("input_features", "input_values"):
        if name in names:
            bins = getattr(config, "num_mel_bins", None) or 80
            length = 2 * _positions(config)
            for sizes in ((1, bins, length), (1, 64, bins), (1, 4000), (1, 1, 4000)):
                yield {name: floats(*sizes), **decoder, **options}
    for name in ("hidden_states", "inputs_embeds", "x", "input"):
        if name in names:
            width = getattr(config, "hidden_size", None) or 0
            yield {name: floats(1, TOKENS, width), **options}


def _positions(config: Any) -> int:
    return getattr(config, "max_source_positions", None) or 32


def example_for(model: nn.Module) -> dict[str, Any]:
    """The first input that the model takes. Raises OpsgraphError if it takes none of ours."""
    tried: list[str] = []
    for example in examples(model):
        try:
            with torch.no_grad():
                model(**example)
            return example
        except Exception as error:  # the model may raise anything
            tried.append(f"{', '.join(example)}: {type(error).__name__}: {str(error)[:100]}")
    shown = "; ".join(tried) or "its forward names no argument that we know"
    raise OpsgraphError(
        f"patch: no example input for {type(model).__name__} ({shown}); give one: "
        "patch(model, dict(input_ids=...))"
    )
