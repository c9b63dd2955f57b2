"""Small data sets on disk and the configs that read them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Smooth random colours: resampling differences would show, and JPEG keeps them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(root, classes: int = 3, each: int = 10, size=(40, 30)):
    for label in range(classes):
        directory = root / f"class_{label}"
        directory.mkdir(parents=True)
        for i in range(each):
            (directory / f"{i:03d}.jpg").write_bytes(encode(picture(label * 1000 + i, size)))
    return root


def write_tars(root, counts=(7, 0, 12, 3), size=(40, 30)):
    """Uneven shards, one of them empty; each sample has jpg, txt and cls."""
    root.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(root / f"part-{shard:03d}.tar", "w") as archive:
            for _ in range(count):
                members = {
                    "jpg": encode(picture(number, size)),
                    "txt": f"caption {number}".encode(),
                    "cls": str(number % 5).encode(),
                }
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"dir.x/{number:05d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                number += 1
    return root


def stream(source, size=16, augment=(), text=False, label=True, preset="vit"):
    """A data stream config."""
    return dict(
        sources=[source] if isinstance(source, dict) else source,
        image=dict(preset=preset, size=size, augment=list(augment)),
        text=dict(max_len=8) if text else None,
        label=dict() if label else None,
    )


def data(train, workers=0, threads=0, **more):
    """A config.data."""
    return dict(
        tokenizer=None, train=train, workers=workers, threads=threads, prefetch=2,
        **{"max_bad_share": 0.01, **more},
    )  # fmt: skip
