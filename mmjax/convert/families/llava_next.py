"""LLaVA-NeXT (LLaVA-1.6): the parts of LLaVA, and a learned token that ends rows of tiles.

Which tiles an image has, its processor says; see `mmjax.data.anyres`.
"""

from __future__ import annotations

from typing import Any

from mmjax.convert.families import llava
from mmjax.convert.family import FAMILIES, Family, Source
from mmjax.data.anyres import PINPOINTS
from mmjax.models import VLM, VLMConfig

TILE = 336  # pixels, of `PINPOINTS`


def from_hf(source: Source) -> VLMConfig:
    """`LlavaNextConfig` -> our config.

    Raises:
      ValueError: as `llava.from_hf`; if the class token is kept, which has no place in a board.
    """
    config = llava.from_hf(source, newline=True)
    if config.extra:
        raise ValueError(
            f"vision_feature_select_strategy={llava.KEPT!r} keeps the class token, but the tiles "
            "of LLaVA-NeXT are laid side by side: they have patches only."
        )
    return config


def to_hf(config: VLMConfig) -> Any:
    """`LlavaNextConfig`, with the boards of LLaVA-NeXT for tiles of this encoder's size."""
    from transformers import LlavaNextConfig

    options = llava.options(config)
    side = options["vision_config"].image_size
    boards = [[pixels * side // TILE for pixels in board] for board in PINPOINTS]
    return LlavaNextConfig(**options, image_grid_pinpoints=boards)


FAMILIES.register("LlavaNextForConditionalGeneration")(
    Family(
        model_type="llava_next",
        model=VLM,
        from_hf=from_hf,
        to_hf=to_hf,
        rows=llava.rows,
        renames=llava.RENAMES,
        module_names=llava.MODULE_NAMES,
        ignored=llava.ignored,
    )
)
