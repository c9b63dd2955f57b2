"""Pictures that a unified model draws: `experiments.generate --draw`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from mmjax.evaluate.chat import Prompt, Speaker
from mmjax.generation import Painter, contact_sheet
from mmjax.models.unified import CodesConfig, UnifiedConfig
from mmjax.models.vlm import TEXT

# Pictures that are drawn together.
BATCH = 16


def check_target(file: str, *, overwrite: bool) -> Path:
    """Where the picture goes.

    Raises:
      ValueError: it is no PNG.
      OSError: its directory does not exist, or it is there already and may not be replaced.
    """
    path = Path(file).expanduser()
    if path.suffix.lower() != ".png":
        raise ValueError(f"--draw={file}: pictures are written as PNG; name a file that ends so.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--draw={file}: there is no directory {path.parent}.")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} is there already and nothing was drawn: choose another --draw, or say "
            "--overwrite."
        )
    return path


def drawing_speaker(speaker: Speaker, mesh: Mesh | None) -> Speaker:
    """The same, whose images are whole.

    Raises:
      ValueError: it draws nothing.
    """
    config = speaker.model.config
    if not isinstance(config, UnifiedConfig):
        raise ValueError(
            f"A {type(speaker.model).__name__} writes text alone: --draw is for unified models."
        )
    if not config.image.tokenizer.decodes or speaker.speech.levels is None:
        raise ValueError("The model's image tokenizer makes codes of images, and no images.")
    if config.follow == "grammar":
        return speaker
    return Speaker(speaker.model.following("grammar"), speaker.speech, mesh=mesh)


def draw(
    speaker: Speaker,
    prompts: Sequence[Prompt],
    count: int,
    *,
    key: jax.Array,
    mesh: Mesh | None = None,
    negative: Prompt | None = None,
    **options: Any,
) -> np.ndarray:
    """Pictures [prompts, count, H, W, C] uint8.

    Args:
      speaker: see `drawing_speaker`.
      prompts: images follow them.
      negative: with guidance, what stands before an image of nothing in particular.
      options: of `Generator.__call__`.

    Raises:
      ValueError: as `Generator.__call__`.
    """
    image = speaker.model.config.image
    rows = [_begun(prompt, image) for prompt in prompts for _ in range(count)]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(rows)))
    if negative is not None:
        options["negative"] = [_begun(negative, image).ids]
    ids = []
    for start in range(0, len(rows), BATCH):
        some = slice(start, start + BATCH)
        out = speaker(rows[some], max_new_tokens=image.length, key=keys[some], **options)
        ids.append(out.tokens)
    mean, std = speaker.speech.levels
    pictures = Painter(speaker.model, mean=mean, std=std, mesh=mesh)(np.concatenate(ids))
    return pictures.reshape(len(prompts), count, *pictures.shape[1:])


def picture_of(texts: Sequence[str], pictures: np.ndarray) -> Image.Image:
    """The one that `draw` made as it is, or a sheet of several."""
    if pictures.shape[:2] == (1, 1):
        return Image.fromarray(pictures[0, 0])
    return contact_sheet(list(zip(texts, pictures, strict=True)))


def _begun(prompt: Prompt, image: CodesConfig) -> Prompt:
    """Up to where codes follow."""
    if len(prompt.ids) and prompt.ids[-1] == image.begin:
        return prompt
    ids = np.append(prompt.ids, np.int32(image.begin))
    return Prompt(ids, np.append(prompt.place, np.int32(TEXT)), prompt.images)
