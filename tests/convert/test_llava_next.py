"""LLaVA-NeXT of transformers, both ways: images of many shapes, unpadded, several in a text."""

import hf
import numpy as np
import processors
import pytest
from towers import refused
from vlms import IMAGE_TOKEN, LANGUAGE, VISION, Stream, check, long

from mmjax.data.anyres import lay_out
from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.load_processor import load_processor
from mmjax.data.visual import LAYOUTS

transformers = hf.transformers()
torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

NAME = "LlavaNextForConditionalGeneration"

# Pixels of the boards.
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
# name -> class of the language model's config, and options as in `test_llava`
CASES = {
    "as published": ("MistralConfig", {}, {"sliding_window": None}, {}),
    "several blocks, llama": (
        "LlamaConfig",
        {"hidden_size": 24, "num_attention_heads": 3},
        {"tie_word_embeddings": True},
        {"vision_feature_layer": [-2, 2], "tie_word_embeddings": True},
    ),
    # transformers reads only the whole's tie_word_embeddings
    "siglip, qwen2": (
        "Qwen2Config",
        {"vision_use_head": False},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
}
# (width, height) of images.
SIZES = {
    "several blocks, llama": [(7, 90), (50, 50), (90, 7)],
    "siglip, qwen2": [(30, 64), (64, 30), (24, 71)],
}
# Unpadded above and below, at the sides, not at all; texts for them.
IMAGES = [
    [processors.picture(0, 61, 17)],
    [processors.picture(1, 20, 90), processors.picture(2, 24, 24)],
    [],
]
TEXTS = ["user: <image> a red dog", "<image> a cat <image> red", "dog"]


def config_of(name):
    text, vision_options, text_options, options = CASES[name]
    vision = "SiglipVisionConfig" if "siglip" in name else "CLIPVisionConfig"
    return transformers.LlavaNextConfig(
        vision_config=getattr(transformers, vision)(**VISION | vision_options),
        text_config=getattr(transformers, text)(**LANGUAGE | text_options),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **options,
    )


def reference(name):
    return getattr(transformers, NAME)(config_of(name))


@pytest.mark.parametrize("name", list(CASES)[1:])
def test_equals_transformers(name, tmp_path):
    plans = [lay_out(*size, PINPOINTS, 24, 3) for size in SIZES[name]]

    def theirs(stream: Stream):
        most = max(map(len, stream.pictures))
        pixels = np.zeros((len(plans), most, *stream.images.shape[2:]), np.float32)
        for row, pictures in zip(pixels, stream.pictures, strict=True):
            row[: len(pictures)] = pictures
        return stream.theirs | {
            "pixel_values": torch.tensor(pixels.transpose(0, 1, 4, 2, 3)),
            "image_sizes": long([(height, width) for width, height in SIZES[name]]),
        }

    rows = ([3, plans[0], 4], [plans[1], 2, plans[2], 5], [6])
    check(reference(name), tmp_path, rows, theirs, derived=False, origin=name != "siglip, qwen2")


def test_images_and_texts_through_processor_and_model(tmp_path):
    """Both processors, both models: from pictures to new tokens."""
    theirs, directory = processor_of("as published", tmp_path / "processor")
    batch = processors.check(directory, theirs, IMAGES, TEXTS)
    config = transformers.LlavaNextConfig.from_pretrained(directory)
    flat = [image for group in IMAGES for image in group]
    inputs = theirs(images=flat, text=TEXTS, padding=True, padding_side="left", return_tensors="pt")
    check(
        getattr(transformers, NAME)(config),
        tmp_path,
        theirs=lambda stream: dict(inputs),
        derived=False,
        batch=Stream(**batch, pictures=[]),
        generator=True,
    )


def processor_of(name, directory, **options):
    """That of transformers, saved beside the config of a case."""
    config, tokenizer = config_of(name), processors.tokenizer("<image>")
    config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    theirs = transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size=24, image_grid_pinpoints=PINPOINTS, **options
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int("siglip" not in name),
    )
    return theirs, processors.save(directory, theirs, config)


def test_processor(tmp_path):
    options = {"resample": 2, "image_mean": [0.5, 0.4, 0.3], "aspect_ratio_setting": "anyres"}
    theirs, directory = processor_of("siglip, qwen2", tmp_path, **options)
    assert "aspect_ratio_setting" in (directory / "processor_config.json").read_text()
    batch = processors.check(directory, theirs, IMAGES, TEXTS)
    assert batch["images"].shape[1] == 4 + 3  # one of three tiles, one of two


def test_layout(tmp_path):
    """Its budget is that of transformers for images of any shape, and so are its pixels."""
    theirs, _ = processor_of("as published", tmp_path)
    layout = LAYOUTS["anyres"](preset="clip", size=24, tokens=9, pinpoints=PINPOINTS)
    sizes = np.random.default_rng(0).integers(1, 130, (400, 2)).tolist()
    sizes += [[1, 500], [700, 3], [24, 48], [47, 24], [72, 25], [48, 48]]
    counts = theirs._get_num_multimodal_tokens(sizes)["num_image_tokens"]
    assert [layout.plan(width, height).tokens for height, width in sizes] == counts
    for index, (height, width) in enumerate(sizes[-6:]):
        image = processors.picture(index, width, height)
        wanted = theirs.image_processor(image, return_tensors="np")["pixel_values"][0]
        pictures = layout.pictures(image)
        assert len(pictures) == layout.plan(width, height).pictures
        np.testing.assert_allclose(pictures, wanted.transpose(0, 2, 3, 1), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 8}, "a square of visual tokens, not of 8"),
        ({"pinpoints": [[24, 40]]}, r"\(24, 40\) is no whole number of tiles of 24"),
        ({"pinpoints": []}, "needs pinpoints"),
    ],
)
def test_layouts_that_cannot_be(options, message):
    given = {"preset": "clip", "size": 24, "tokens": 9, "pinpoints": PINPOINTS} | options
    with pytest.raises(ValueError, match=message):
        LAYOUTS["anyres"](**given)


def test_what_cannot_be_computed_is_refused(tmp_path):
    config = config_of("as published")
    config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="they have patches only"):
        refused(NAME, config)
    _, directory = processor_of("as published", tmp_path)
    config = transformers.LlavaNextConfig.from_pretrained(directory)
    config.image_grid_pinpoints = [[24, 48]]
    config.save_pretrained(directory)
    with pytest.raises(ProcessorConfigError, match=r"image_grid_pinpoints is .* do not belong"):
        load_processor(directory)
