"""Preprocessing against the PIL-based image processors of transformers; modes and damage."""

import numpy as np
import pytest
from PIL import Image
from samples import encode, picture

from mmjax.data.image import CorruptImageError, decode, denormalize, flatten, open_image, preprocess
from mmjax.registry import UnknownNameError

transformers = pytest.importorskip("transformers")

PROCESSORS = {
    "clip": ("CLIPImageProcessorPil", lambda s: dict(
        size={"shortest_edge": s}, crop_size={"height": s, "width": s})),
    "siglip": ("SiglipImageProcessorPil", lambda s: dict(size={"height": s, "width": s})),
    "vit": ("ViTImageProcessorPil", lambda s: dict(size={"height": s, "width": s})),
}  # fmt: skip


@pytest.mark.parametrize("size", [32, 45])
@pytest.mark.parametrize("preset", sorted(PROCESSORS))
@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (50, 50), (20, 17), (300, 41)])
def test_equals_the_hf_processor(preset, size, shape):
    name, settings = PROCESSORS[preset]
    processor = getattr(transformers, name)(**settings(size))
    image = picture(1, shape)
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    got = preprocess(image, preset, size)
    np.testing.assert_allclose(got, expected.transpose(1, 2, 0), atol=2e-6)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK"])
def test_modes_as_in_transformers(mode):
    image = picture(2, (40, 40))
    if "A" in mode:
        image.putalpha(picture(3, (40, 40)).convert("L"))
    image = image.convert(mode)
    processor = transformers.SiglipImageProcessorPil(size={"height": 24, "width": 24})
    expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    np.testing.assert_allclose(
        preprocess(image, "siglip", 24), expected.transpose(1, 2, 0), atol=2e-6
    )


def test_transparent_palette_lies_on_white():
    image = Image.new("P", (8, 8), 0)
    image.putpalette([10, 20, 30] * 256)
    data = encode(image, "PNG", transparency=0)
    assert (np.asarray(flatten(decode(data))) == 255).all()


def test_sixteen_bit_grey_keeps_its_range():
    levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    got = np.asarray(flatten(decode(encode(Image.fromarray(levels), "PNG"))))[..., 0]
    np.testing.assert_allclose(got, levels / 257, atol=1)


def test_exif_orientation_is_applied():
    image = picture(4, (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    got = decode(encode(image, "PNG", exif=exif))
    assert got.size == (20, 40)
    np.testing.assert_array_equal(np.asarray(got), np.rot90(np.asarray(image), -1))


def test_arrays_and_bytes_give_the_same():
    image = picture(5)
    png = preprocess(encode(image, "PNG"), "vit", 16)
    np.testing.assert_array_equal(png, preprocess(np.asarray(image), "vit", 16))
    grey = np.asarray(image.convert("L"))
    np.testing.assert_array_equal(
        preprocess(grey, "vit", 16), preprocess(grey[..., None], "vit", 16)
    )


def test_denormalize_is_the_inverse():
    image = picture(6, (16, 16))
    got = denormalize(preprocess(image, "clip", 16), "clip")
    np.testing.assert_array_equal(got, np.asarray(image))


def test_damaged_images_are_named_corrupt():
    good = encode(picture(7, (200, 150)))
    for damaged in (b"", b"not an image", good[: len(good) // 2], encode(picture(1), "PNG")[:60]):
        with pytest.raises(CorruptImageError):
            decode(damaged)


def test_decompression_bomb_is_corrupt():
    header = encode(Image.new("1", (16, 16)), "PNG")
    # The size field of the header says 40000 x 40000; only the header is read before refusing.
    import struct
    import zlib

    chunk = b"IHDR" + struct.pack(">II", 40000, 40000) + header[24:29]
    bomb = header[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + header[33:]
    with pytest.raises(CorruptImageError, match="bomb"):
        open_image(bomb)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'siglip'"):
        preprocess(picture(1), "siglp", 16)
