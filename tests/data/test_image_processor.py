"""Image processors against the PIL-based ones of transformers, on fifty odd images."""

import io
import json
import re

import numpy as np
import pytest
from odd_images import odd_images
from PIL import Image
from samples import picture

import mmjax.data.image_processor as ours
from mmjax.data.image import CorruptImageError
from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.image_processor import ImageProcessor
from mmjax.patches import Patches
from mmjax.registry import UnknownNameError

transformers = pytest.importorskip("transformers")

# (class, options): every option at least once away from its default.
CONFIGS = {
    "vit": ("ViTImageProcessor", {"size": {"height": 24, "width": 32}}),
    "vit_old": ("ViTFeatureExtractor", {"size": 20, "resample": 3, "do_convert_rgb": True}),
    "vit_raw": (
        "ViTImageProcessor",
        {"size": 18, "do_rescale": False, "image_mean": 0.25, "image_std": [2.0, 3.0, 5.0]},
    ),
    "vit_levels": ("ViTImageProcessor", {"size": [18, 20], "do_normalize": False}),
    "vit_padded": (
        "ViTImageProcessor",
        {
            "size": {"max_height": 30, "max_width": 22},
            "do_pad": True,
            "pad_size": {"height": 31, "width": 25},
            "do_convert_rgb": True,
        },
    ),
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 24}, "crop_size": 24}),
    "clip_old": (
        "CLIPFeatureExtractor",
        {"size": 30, "crop_size": 21, "resample": 3, "do_convert_rgb": None, "size_divisor": None},
    ),
    "clip_small": (  # smaller than the crop: black around it
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 13}, "crop_size": {"height": 32, "width": 19}},
    ),
    "clip_uncropped": (
        "CLIPImageProcessorFast",
        {"size": {"height": 17, "width": 29}, "do_center_crop": False, "rescale_factor": 1 / 127.5},
    ),
    "clip_unresized": ("CLIPImageProcessor", {"do_resize": False, "crop_size": 48}),
    "siglip": ("SiglipImageProcessor", {"size": {"height": 32, "width": 24}}),
    "siglip_lanczos": ("SiglipImageProcessor", {"size": {"height": 9, "width": 9}, "resample": 1}),
    "dinov2": ("BitImageProcessor", {"size": {"shortest_edge": 37}, "crop_size": 28}),
    "dinov2_bounded": (
        "BitImageProcessor",
        {"size": {"shortest_edge": 24, "longest_edge": 40}, "crop_size": 20, "resample": 2},
    ),
    "chameleon": ("ChameleonImageProcessor", {"size": {"shortest_edge": 26}, "crop_size": 24}),
    "siglip2": ("Siglip2ImageProcessor", {"patch_size": 8, "max_num_patches": 40}),
    "siglip2_rgb": (
        "Siglip2ImageProcessor",
        {"patch_size": 5, "max_num_patches": 64, "do_convert_rgb": True, "resample": 3},
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The images, as files."""
    directory = tmp_path_factory.mktemp("odd")
    paths = []
    for name, data in odd_images().items():
        paths.append(directory / name)
        paths[-1].write_bytes(data)
    assert len(paths) >= 50
    return paths


def reference(name, options):
    current = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    return getattr(transformers, current + "Pil").from_dict(options)


def expected(processor, image):
    """What transformers makes of one image, in our layout; None where it refuses."""
    try:
        batch = processor(image, return_tensors="np")
    except ValueError as error:
        # As many means as channels; a side of no pixels; 16 bits.
        assert re.search("must have . elements|must be > 0|outside the range", str(error)), error
        return None
    pixels = np.asarray(batch["pixel_values"])
    if "spatial_shapes" in batch:
        shapes, mask = batch["spatial_shapes"], batch["pixel_attention_mask"]
        return Patches(pixels, np.asarray(shapes), np.asarray(mask))
    return pixels.transpose(0, 2, 3, 1)


def assert_equal(got, wanted, what):
    if isinstance(got, Patches):
        for part in Patches._fields:
            np.testing.assert_array_equal(getattr(got, part), getattr(wanted, part), err_msg=what)
    else:
        np.testing.assert_array_equal(got, wanted, err_msg=what)


@pytest.mark.parametrize("case", CONFIGS)
def test_equals_transformers_bit_for_bit(case, files):
    name, options = CONFIGS[case]
    theirs, mine = reference(name, options), ImageProcessor(name, options)
    compared = 0
    for path in files:
        # A path, and the picture as it lies in the file: transformers treats them differently.
        for image, source in ((str(path), path), (Image.open(path), Image.open(path))):
            wanted, what = expected(theirs, image), f"{case}: {source}"
            is_rgb = source is path or mine.options.do_convert_rgb or source.mode == "RGB"
            if wanted is None or not is_rgb:
                # Three bands of another kind (LAB) are taken for RGB by transformers; not here.
                with pytest.raises(ValueError, match=r"do_convert_rgb=True|would vanish"):
                    mine(source)
            else:
                assert_equal(mine(source), wanted, what)
                compared += 1
        if wanted is not None and is_rgb:
            assert_equal(mine(path.read_bytes()), expected(theirs, str(path)), what)
    assert compared >= 50


def test_batches_and_arrays_as_transformers(files):
    name, options = CONFIGS["clip"]
    theirs, mine = reference(name, options), ImageProcessor(name, options)
    images = [Image.open(path) for path in files[:12]]
    assert_equal(mine(images), expected(theirs, images), "batch")
    assert mine(images).dtype == np.float32 and mine(images).shape == (12, 24, 24, 3)
    colours = np.asarray(picture(3, (41, 23)))
    alpha = np.dstack([colours, np.asarray(picture(4, (41, 23)).convert("L"))])
    for array in (colours, alpha, colours[..., :1]):
        assert_equal(mine(array), expected(theirs, array), str(array.shape))
    assert_equal(mine(colours[..., 0]), mine(colours[..., :1]), "no channels")


def test_options_of_a_call_replace_those_of_the_directory():
    image = picture(1, (50, 33))
    name, options = CONFIGS["siglip2"]
    changed = options | {"max_num_patches": 9}
    wanted = expected(reference(name, changed), image)
    assert_equal(ImageProcessor(name, options)(image, max_num_patches=9), wanted, "changed")
    assert wanted.mask.shape == (1, 9)


def test_written_configs_are_read(tmp_path):
    """Everything transformers writes is known: nothing of it is refused."""
    for name, options in CONFIGS.values():
        written = json.loads(reference(name, options).to_json_string())
        image = picture(2, (50, 33))
        assert_equal(
            ImageProcessor(written["image_processor_type"], written)(image),
            ImageProcessor(name, options)(image),
            name,
        )


@pytest.mark.parametrize(
    "name,options,pattern",
    [
        ("CLIPImageProcesor", {}, "did you mean 'CLIPImageProcessor'"),
        ("Qwen2VLImageProcessor", {}, "Valid: BitImageProcessor, Blip"),
        ("CLIPImageProcessor", {"do_centre_crop": True}, "did you mean 'do_center_crop'"),
        ("CLIPImageProcessor", {"patch_size": 14}, "'patch_size' = 14 is not known"),
        ("Siglip2ImageProcessor", {"size": {"height": 4, "width": 4}}, "'size'.*not known"),
        ("Siglip2ImageProcessor", {"max_num_patches": 0}, "at least 1"),
        ("Siglip2ImageProcessor", {"patch_size": None}, "patch_size is None"),
        ("ViTImageProcessor", {"size": {"longest_edge": 4}}, "height and width; shortest_edge;"),
        ("ViTImageProcessor", {"size": None}, "do_resize needs size"),
        ("ViTImageProcessor", {"rescale_factor": "1/255"}, "expected a number"),
        ("ViTImageProcessor", {"size": "big"}, "size is 'big'"),
        ("ViTImageProcessor", {"size": 0}, "at least 1"),
        ("CLIPImageProcessor", {"crop_size": {"shortest_edge": 4}}, "it must have height and"),
        ("ViTImageProcessor", {"resample": 9}, r"3 \(bicubic\)"),
        ("ViTImageProcessor", {"image_mean": [0.5, 0.5]}, "one number, or three"),
        ("ViTImageProcessor", {"do_resize": "yes"}, "true or false"),
        ("ViTImageProcessor", {"do_pad": True}, "needs pad_size"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(name, options, pattern):
    with pytest.raises((UnknownNameError, ProcessorConfigError), match=pattern):
        ImageProcessor(name, options)


def test_what_asks_for_nothing_is_not_an_option():
    ImageProcessor("CLIPImageProcessor", {"crop_pct": None, "do_flip_channel_order": False})


def test_bad_images(tmp_path):
    clip = ImageProcessor("CLIPImageProcessor", {})
    with pytest.raises(CorruptImageError, match="too unequal"):
        clip(Image.new("RGB", (1, 60_000)))
    bounded = ImageProcessor("ViTImageProcessor", {"size": {"max_height": 9, "max_width": 9}})
    with pytest.raises(CorruptImageError, match="would vanish"):
        bounded(Image.new("RGB", (1, 500)))
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(CorruptImageError):
        clip(tmp_path / "text.png")
    with pytest.raises(ValueError, match=r"did you mean 'text\.png'"):
        clip(str(tmp_path / "texte.png"))
    with pytest.raises(ValueError, match="download the image"):
        clip("https://example.org/cat.png")
    with pytest.raises(ValueError, match="not a dict"):
        clip({})
    with pytest.raises(ValueError, match="no images"):
        clip([])
    with pytest.raises(ValueError, match="uint8"):
        clip(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        clip(np.zeros((4, 4, 4), np.float32))
    padded = ImageProcessor(*CONFIGS["vit_padded"])
    with pytest.raises(ProcessorConfigError, match="larger than pad_size"):
        padded(picture(1), pad_size=8)
    loose = ImageProcessor("CLIPImageProcessor", {"do_center_crop": False, "size": 8})
    with pytest.raises(ProcessorConfigError, match="different sizes"):
        loose([picture(1, (20, 30)), picture(2, (30, 20))])
    with pytest.raises(ProcessorConfigError, match="whole patches"):
        ImageProcessor(*CONFIGS["siglip2"])(picture(1, (12, 16)), do_resize=False)


def test_bytes_and_files_are_the_same():
    buffer = io.BytesIO()
    picture(5).save(buffer, "PNG")
    vit = ImageProcessor("ViTImageProcessor", {"size": 8})
    np.testing.assert_array_equal(vit(buffer.getvalue()), vit(picture(5)))
    assert ours.recipe_name("ViTFeatureExtractor") == "ViTImageProcessor"
