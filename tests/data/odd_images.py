"""Fifty image files of the modes, shapes and metadata that break preprocessing."""

from __future__ import annotations

import numpy as np
from PIL import Image
from samples import encode, picture

_XMP = (
    b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="8"/></rdf:RDF></x:xmpmeta>'
    b'<?xpacket end="w"?>'
)


def _oriented(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def _with_alpha(seed: int, size=(37, 23)) -> Image.Image:
    image = picture(seed, size)
    image.putalpha(picture(seed + 1, size).convert("L"))
    return image


def _sixteen_bit(top: int) -> Image.Image:
    return Image.fromarray(np.linspace(0, top, 31 * 22).reshape(31, 22).astype(np.uint16))


def odd_images() -> dict[str, bytes]:
    """name.suffix -> the file."""
    files = {}

    def add(name: str, image: Image.Image, kind: str = "PNG", **options):
        files[f"{name}.{kind.lower()}"] = encode(image, kind, **options)

    narrow = [(1, 1), (1, 40), (40, 1), (2, 3), (1, 600), (900, 3)]
    wide = [(31, 32), (33, 32), (64, 64), (32, 32), (97, 61), (61, 97), (300, 41), (255, 257)]
    for i, size in enumerate(narrow + wide):
        add(f"rgb_{size[0]}x{size[1]}", picture(i, size))
    for turn in range(1, 9):
        add(f"turned_{turn}", picture(20 + turn, (40, 27)), "JPEG", exif=_oriented(turn))
    add("turned_png", picture(30, (40, 27)), exif=_oriented(6))
    add("turned_webp", picture(31, (40, 27)), "WEBP", exif=_oriented(3))
    add("turned_tiff", picture(32, (40, 27)), "TIFF", exif=_oriented(8))
    add("turned_xmp", picture(33, (40, 27)), "JPEG", xmp=_XMP)
    add("turned_alpha", _with_alpha(34), exif=_oriented(5))
    add("broken_exif", picture(35), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    add("grey", picture(40).convert("L"))
    add("grey_jpeg", picture(41).convert("L"), "JPEG")
    add("grey_alpha", _with_alpha(42).convert("LA"))
    add("grey_keyed", picture(43).convert("L"), transparency=128)
    add("rgb_keyed", picture(44).quantize(4).convert("RGB"), transparency=(0, 0, 0))
    add("alpha", _with_alpha(45))
    add("alpha_webp", _with_alpha(46), "WEBP")
    add("alpha_nothing", Image.new("RGBA", (20, 30), (200, 10, 10, 0)))
    add("palette", picture(47).quantize(16))
    add("palette_keyed", picture(48).quantize(16), transparency=3)
    add("palette_alphas", picture(49).quantize(4), transparency=bytes([0, 90, 180, 255]))
    add("palette_gif", picture(50).quantize(16), "GIF", transparency=2)
    animation = [picture(51 + i).quantize(16) for i in range(3)]
    add("animated", animation[0], "GIF", save_all=True, append_images=animation[1:])
    add("bits", picture(55).convert("1"))
    add("bits_bmp", picture(56).convert("1"), "BMP")
    add("cmyk", picture(57).convert("CMYK"), "JPEG")
    add("cmyk_tiff", picture(58).convert("CMYK"), "TIFF")
    add("lab", picture(59).convert("LAB"), "TIFF")
    add("sixteen_bits", _sixteen_bit(65535))
    add("twelve_bits", _sixteen_bit(4095))
    add("sixteen_bits_small", _sixteen_bit(200))
    add("ints", picture(60).convert("I"), "TIFF")
    add("floats", picture(61).convert("F"), "TIFF")
    add("progressive", picture(62, (45, 80)), "JPEG", progressive=True)
    add("ppm", picture(63, (19, 77)), "PPM")
    return files
