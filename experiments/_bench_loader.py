"""`bench loader`: images a second of the data loader, beside PIL alone and the webdataset package.

The work of every row: decode a JPEG of 500 x 375, random resized crop to 224 (bicubic), flip half
of them, normalise to float32, stack into batches. "PIL alone" stops after the flip and reads from
memory.

What is compared fairly, and what is not:
  - `plain` rows crop, resize and normalise with one PIL or numpy call per step, as most recipes do;
    `fused` rows do it as mmjax does (crop inside the resize, normalise straight into the batch;
    large JPEGs are decoded at reduced size, which never applies at 500 x 375). Rows of the same
    kind show the loader alone, mmjax fused beside webdataset plain what a user gets.
  - webdataset reads its shards in sequence, mmjax at random positions; both from the page cache.
  - All on one core, in one process, one after the other in each repeat, so that a slow moment of
    the machine hits all rows. Images per CPU second is the figure to trust where other programs
    run.

The images are synthetic: 1/f noise in correlated colour channels with soft-edged shapes, with the
spectrum and about the file size of photographs, so that the JPEG decoder has its usual work.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageOps

from mmjax.data import open_train
from mmjax.data.augment import AUGMENTATIONS, Augmentation, RandomResizedCrop
from mmjax.data.image import PRESETS, normalize_into

BATCH = 64
PRESET = PRESETS["clip"]


def synthetic_photograph(rng: np.random.Generator, width: int = 500, height: int = 375) -> bytes:
    """A JPEG of about 100 kB."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0

    def noise() -> np.ndarray:
        waves = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        return np.fft.irfft2(waves / frequency**1.2, s=(height, width))

    common = noise()
    pixels = np.stack([common + 0.35 * noise() for _ in range(3)], axis=-1)
    pixels = (pixels - pixels.mean()) / pixels.std() * 45 + 120
    y, x = np.mgrid[:height, :width]
    for _ in range(6):
        radius = rng.uniform(20, 90)
        distance = np.hypot(x - rng.uniform(0, width), y - rng.uniform(0, height)) - radius
        cover = np.clip(0.5 - distance / 3, 0, 1)[..., None] * 0.7
        pixels = pixels * (1 - cover) + cover * rng.uniform(0, 255, size=3)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=93)
    return buffer.getvalue()


def write_images(root: Path, count: int) -> list[bytes]:
    """The images as a folder (`root/folder/images`) and as four tars (`root/part-N.tar`)."""
    rng = np.random.default_rng(0)
    images = [synthetic_photograph(rng) for _ in range(count)]
    folder = root / "folder" / "images"
    folder.mkdir(parents=True)
    for i, data in enumerate(images):
        (folder / f"{i:05d}.jpg").write_bytes(data)
    for shard in range(4):
        with tarfile.open(root / f"part-{shard}.tar", "w") as archive:
            for i in range(shard, count, 4):
                info = tarfile.TarInfo(f"{i:05d}.jpg")
                info.size = len(images[i])
                archive.addfile(info, io.BytesIO(images[i]))
    return images


@AUGMENTATIONS.register("bench_plain_crop")
@dataclass(frozen=True)
class PlainCrop(Augmentation):
    """The same crop in separate steps: decode, crop, resize."""

    draws_unloaded: ClassVar[bool] = False

    def __call__(self, image, rng, size):
        image = image.convert("RGB")
        box = RandomResizedCrop().box(image.width, image.height, rng)
        return image.crop(box).resize((size, size), Image.Resampling.BICUBIC)


def flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def plain_transform(image: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    levels = np.asarray(flip(PlainCrop()(image, rng, size), rng)).astype(np.float32) / 255
    return (levels - np.asarray(PRESET.mean, np.float32)) / np.asarray(PRESET.std, np.float32)


def fused_transform(image: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    out = np.empty((size, size, 3), np.float32)
    normalize_into(flip(RandomResizedCrop()(image, rng, size), rng), PRESET, out)
    return out


Rows = dict[
    str, Callable[[], Iterator[int]]
]  # name -> passes over the images, yielding batch sizes


def mmjax_row(source: dict, crop: str, size: int, count: int, **loading: int):
    augment = [dict(name=crop), dict(name="flip")]
    config = dict(
        train=dict(sources=[source], image=dict(preset="clip", size=size, augment=augment)),
        **{"workers": 0, "threads": 0, "prefetch": 2, **loading},
    )

    def run() -> Iterator[int]:
        loader = open_train(config, None, batch_size=BATCH, seed=0)
        try:
            for _ in range(count // BATCH):
                yield len(next(loader).arrays["image"])
        finally:
            loader.close()

    return run


def webdataset_row(pattern: str, transform, size: int, decode: bool):
    import webdataset

    def run() -> Iterator[int]:
        rng = np.random.default_rng(0)
        pipeline = webdataset.WebDataset(pattern, shardshuffle=4, seed=0, empty_check=False)
        pipeline = pipeline.shuffle(100, seed=0)
        if decode:
            pipeline = pipeline.decode("pil").to_tuple("jpg")
            pipeline = pipeline.map_tuple(lambda image: transform(image, rng, size))
        else:
            pipeline = pipeline.to_tuple("jpg").map_tuple(
                lambda data: transform(Image.open(io.BytesIO(data)), rng, size)
            )
        for (batch,) in pipeline.batched(BATCH, partial=False):
            yield len(batch)

    return run


def pil_row(images: list[bytes], size: int):
    def run() -> Iterator[int]:
        rng = np.random.default_rng(0)
        for data in images:
            flip(PlainCrop()(Image.open(io.BytesIO(data)), rng, size), rng)
            yield 1

    return run


def measure(rows: Rows, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Per row and repeat, images a second of wall and of CPU time; a first repeat is dropped."""
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):
        for name, run in rows.items():
            wall, cpu = time.perf_counter(), time.process_time()
            count = sum(run())
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if repeat:
                results[name].append((count / wall, count / cpu))
    return results


def print_table(results: dict[str, list[tuple[float, float]]], reference: str) -> None:
    base = statistics.median(cpu for _, cpu in results[reference])
    print(f"{'':38}{'img/s':>8}{'img/CPU-s':>11}{'(min - max)':>16}{'ratio':>8}")
    for name, values in results.items():
        wall = statistics.median(value for value, _ in values)
        cpus = [value for _, value in values]
        cpu = statistics.median(cpus)
        span = f"({min(cpus):.0f} - {max(cpus):.0f})"
        print(f"{name:38}{wall:8.0f}{cpu:11.0f}{span:>16}{cpu / base:8.2f}")
    print(f"ratio: images per CPU second, relative to {reference!r}; medians.")


def print_parallel(source, crop, size: int, count: int, repeats: int, **loading: int) -> None:
    """One loader goes on through all passes, so that starting processes is not counted."""
    prefetch = 2 * sum(loading.values())
    passes = mmjax_row(source, crop, size, (repeats + 1) * count, prefetch=prefetch, **loading)()
    rates, done, start = [], 0, time.perf_counter()
    for images in passes:
        done += images
        if done >= count:
            now = time.perf_counter()
            rates.append(done / (now - start))
            done, start = 0, now
    kind, number = next(iter(loading.items()))
    spread = f"({min(rates[1:]):.0f} - {max(rates[1:]):.0f})"
    name = f"mmjax tars, fused, {number} {kind}"
    print(f"{name:38}{statistics.median(rates[1:]):8.0f} img/s {spread}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench loader", description="Loader throughput.")
    parser.add_argument("--images", type=int, default=512, help="images per pass")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument("--workers", type=int, default=0, help="also: this many worker processes")
    arguments = parser.parse_args(argv)
    if arguments.images < 4 * BATCH:
        parser.error(f"--images must be at least {4 * BATCH}")
    size, count = arguments.size, arguments.images
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as directory:
        root = Path(directory)
        images = write_images(root, count)
        kilobytes = sum(map(len, images)) / len(images) / 1000
        print(f"{count} synthetic JPEGs of 500 x 375, {kilobytes:.0f} kB each, crop to {size}")
        tars = dict(name="webdataset", shards=str(root / "part-*.tar"))
        folder = dict(name="folder", root=str(root / "folder"))
        pattern = str(root / "part-{0..3}.tar")
        fused = "random_resized_crop"
        rows: Rows = {
            "PIL alone, plain": pil_row(images, size),
            "webdataset, plain": webdataset_row(pattern, plain_transform, size, decode=True),
            "webdataset, fused": webdataset_row(pattern, fused_transform, size, decode=False),
            "mmjax tars, plain": mmjax_row(tars, "bench_plain_crop", size, count),
            "mmjax tars, fused": mmjax_row(tars, fused, size, count),
            "mmjax folder, fused": mmjax_row(folder, fused, size, count),
        }
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
        print("\nOne core, no threads:")
        results = measure(rows, arguments.repeats)
        print_table(results, "webdataset, plain")
        os.sched_setaffinity(0, cores)
        print(f"\nAll {len(cores)} cores, wall time, from the second pass over the images on:")
        print_parallel(tars, fused, size, count, arguments.repeats, threads=len(cores))
        if arguments.workers:
            print_parallel(tars, fused, size, count, arguments.repeats, workers=arguments.workers)
    return 0


if __name__ == "__main__":
    main()
