"""What a tokenizer's codes keep of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmjax.data.image import PRESETS
from mmjax.evaluate.base import EVALUATORS, Evaluator
from mmjax.evaluate.context import EvalContext
from mmjax.evaluate.image_metrics import frechet_distance, psnr, ssim, to_unit
from mmjax.evaluate.sheets import GREY, figure_class
from mmjax.params import Params
from mmjax.quantizers import counts, perplexity, usage
from mmjax.search import open_embedder

COLUMNS = 12


@EVALUATORS.register("reconstruction")
class Reconstruction(Evaluator):
    """PSNR and SSIM of images that were made of codes, and how the codes are used.

    Args:
      data: a data config with `image`.
      encoder: a model of images and texts, the work directory of a run or a directory of Hugging
        Face format, in whose features the Frechet distance of the images from the originals is
        told; None tells none. Figures compare only if the encoder is the same, and the number of
        images; it is not FID, whose encoder is Inception.
      sheet: the file name of a picture of originals and what was made of them, written to the work
        directory at each run; None writes none.
      sheet_images: how many of them it shows, evenly spread over the data.
      title: what the images are, for the picture and the printed table.
      note: a line under the picture, e.g. `mmjax.evaluate.ICONS_NOTE`.
      context: of a model that has a `tokenizer`.
    """

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        encoder: str | None = None,
        sheet: str | None = None,
        sheet_images: int = 2 * COLUMNS,
        title: str = "",
        note: str = "",
        context: EvalContext,
    ):
        self._data, self._context = data, context
        self._sheet, self._sheet_images = sheet, sheet_images
        self._title, self._note = title, note
        self._encoder = encoder
        self._embedder = None
        if encoder is not None:
            self._embedder = open_embedder(encoder, batch_size=context.batch_size)
        preset = PRESETS[data["image"]["preset"]]

        def run(model, batch):
            tokenizer = model.tokenizer
            found = tokenizer(batch["image"])
            images, made = (
                to_unit(x, preset.mean, preset.std) for x in (batch["image"], found.images)
            )
            each = jax.vmap(lambda codes: counts(codes, tokenizer.config.quantizer))(found.codes)
            return {
                "psnr": psnr(made, images, peak=1.0),
                "ssim": ssim(made, images, peak=1.0),
                "counts": each,
                "images": jnp.round(255 * images).astype(jnp.uint8),
                "made": jnp.round(255 * made).astype(jnp.uint8),
            }

        self._run = context.compile(run)

    def run(self, params: Params) -> dict[str, float]:
        """`psnr` in dB and `ssim`, means over images; `usage`, the share of codes that occur at
        all, and `perplexity`, where a place has several codes the means of theirs; `frechet`;
        `examples`."""
        found = self._context.collect(self._run, params, self._data).outputs
        seen = jnp.asarray(found["counts"].sum(axis=0, dtype=np.float32))
        scores = {
            "psnr": float(found["psnr"].mean()),
            "ssim": float(found["ssim"].mean()),
            "usage": float(usage(seen).mean()),
            "perplexity": float(perplexity(seen).mean()),
            "examples": float(len(found["images"])),
        }
        if self._embedder is not None:
            made, images = (self._embedder.images(list(found[x])) for x in ("made", "images"))
            scores["frechet"] = frechet_distance(made, images)
        if self._sheet is not None and jax.process_index() == 0:
            number = min(self._sheet_images, len(found["images"]))
            shown = np.linspace(0, len(found["images"]) - 1, number).round().astype(int)
            reconstruction_sheet(
                found["images"][shown],
                found["made"][shown],
                self._context.workdir / self._sheet,
                title=f"{self._title}: originals, and below them what was made of their codes",
                note=f"PSNR {scores['psnr']:.1f} dB, SSIM {scores['ssim']:.3f}. {self._note}",
            )
        return scores

    def describe(self, scores: Mapping[str, float]) -> str:
        lines = [f"Reconstruction: {self._title}"] if self._title else []
        names = {
            "psnr": "PSNR in dB",
            "ssim": "SSIM",
            "usage": "share of codes that occur",
            "perplexity": "perplexity of codes",
            "frechet": f"Frechet distance, features of {self._encoder}",
            "examples": "images",
        }
        lines += [
            f"{text:<60} {scores[name]:.4g}" for name, text in names.items() if name in scores
        ]
        return "\n".join(lines)


def reconstruction_sheet(
    images: np.ndarray, made: np.ndarray, path: str | Path, *, title: str, note: str = ""
) -> None:
    """Draw images and, below each, what was made of it.

    Args:
      images: [N, H, W, 3] uint8.
      made: likewise.
      path: of the PNG; its directory must exist.
      title: at the top.
      note: a line at the bottom.
    """
    columns = min(COLUMNS, len(images))
    bands = -(-len(images) // columns)
    # In inches: pictures, a gap between the pairs, and lines of text.
    cell, gap, text = 0.95, 0.15, 0.4
    width = columns * cell + 2 * gap
    height = bands * (2 * cell + gap) + 2 * text
    figure = figure_class()(figsize=(width, height), dpi=110, facecolor="white")
    figure.text(gap / width, 1 - text / 2 / height, title, fontsize=11, va="center")
    figure.text(gap / width, text / 2 / height, note, fontsize=8.5, va="center", color=GREY)
    for number, pair in enumerate(zip(images, made, strict=True)):
        band, column = divmod(number, columns)
        for below, image in enumerate(pair):
            x = gap + column * cell
            y = height - text - band * (2 * cell + gap) - (below + 1) * cell
            size = 0.96 * cell
            axes = figure.add_axes((x / width, y / height, size / width, size / height))
            axes.imshow(image, interpolation="nearest")
            axes.set_axis_off()
    figure.savefig(path, metadata={"Software": None})
