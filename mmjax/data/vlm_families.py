"""What processors of vision-language models do of their own, by their class in transformers.

To add one, register a function that makes its `Sight` in `PROCESSORS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mmjax.data import anyres, emu3, idefics3, janus, mllama
from mmjax.data.image import PRESETS
from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.image_processor import ImageProcessor
from mmjax.data.visual import Plan
from mmjax.data.vlm_processor import PROCESSORS, Facts, Sight, agreed

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Where a directory names no class, its model decides, as in transformers.
CLASS_OF_MODEL = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "paligemma": "PaliGemmaProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "mllama": "MllamaProcessor",
    "blip-2": "Blip2Processor",
    "idefics": "IdeficsProcessor",
    "chameleon": "ChameleonProcessor",
    "emu3": "Emu3Processor",
    "janus": "JanusProcessor",
}


def class_of(declared: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str | None:
    """A name in `PROCESSORS`, or None if a directory's processor is none of those.

    Args:
      declared: contents of the files that may name a class.
      config: that of the model.
    """
    for content in declared:
        name = content.get("processor_class")
        if name is not None:
            return name if name in PROCESSORS else None
    return CLASS_OF_MODEL.get(config.get("model_type"))


def picture_side(images: ImageProcessor, model: PretrainedConfig | None) -> int:
    """`square_side`, which is that of the model's `vision_config`.

    Raises:
      ProcessorConfigError: if it is not.
    """
    there = None if model is None else model.vision_config.image_size
    return agreed("the size of pictures", square_side(images), there)


def square_side(images: ImageProcessor) -> int:
    """Side of the square pictures that an image processor makes.

    Raises:
      ProcessorConfigError: if they are no squares of one size.
    """
    options = images.options
    size = options.crop_size if options.do_center_crop else options.size
    if not size or set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise ProcessorConfigError(
            f"{images.name}: pictures must all be squares of one size; set crop_size, or size, to "
            "that height and width."
        )
    return size["height"]


def _extra_tokens(facts: Facts) -> int:
    """Visual tokens of a picture beside those of its patches."""
    key = "vision_feature_select_strategy"
    strategy = agreed(key, facts.processor.get(key), facts.model and getattr(facts.model, key))
    taken = strategy == "default"
    # Old directories do not say that there is a class token to take away.
    return facts.processor.get("num_additional_image_tokens", int(taken)) - taken


def _token(facts: Facts) -> str:
    return facts.processor.get("image_token") or Sight.token


def _patches(facts: Facts, side: int) -> int:
    """Along a side of a picture."""
    model = facts.model
    there = None if model is None else model.vision_config.patch_size
    return side // agreed("patch_size", facts.processor.get("patch_size"), there)


def _whole(tokens: int) -> Callable[[int, int], Plan]:
    plan = Plan(1, (np.arange(tokens, dtype=np.int32),))
    return lambda width, height: plan


def _on_square(mean: Sequence[float]) -> Callable[[Image.Image], list[Image.Image]]:
    """Puts an image into the middle of a square of a colour, whose channels go from 0 to 1."""
    color = tuple(int(level * 255) for level in mean)

    def views(image: Image.Image) -> list[Image.Image]:
        side = max(image.size)
        square = Image.new("RGB", (side, side), color)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return [square]

    return views


@PROCESSORS.register("LlavaProcessor")
def _llava(facts: Facts) -> Sight:
    options, kind, views = dict(facts.images), facts.kind, Sight.views
    if kind == "LlavaImageProcessor":  # CLIP's, but that it pads to a square
        kind, squared = "CLIPImageProcessor", options.pop("do_pad", False)
        color = options.get("image_mean") or PRESETS["clip"].mean
        views = _on_square(color) if squared else views
    images = ImageProcessor(kind, options)
    side = picture_side(images, facts.model)
    tokens = _patches(facts, side) ** 2 + _extra_tokens(facts)
    return Sight(images, (side, side), tokens, _whole(tokens), views, _token(facts))


@PROCESSORS.register("LlavaNextProcessor")
def _llava_next(facts: Facts) -> Sight:
    options = dict(facts.images)
    pinpoints = options.pop("image_grid_pinpoints", anyres.PINPOINTS)
    options.pop("do_pad", None)  # pads numbers of tiles, as is always done here
    options.pop("aspect_ratio_setting", None)  # "anyres", in the published directories
    images = ImageProcessor("CLIPImageProcessor", options)
    side, resample = picture_side(images, facts.model), images.options.resample
    agreed("image_grid_pinpoints", pinpoints, facts.model and facts.model.image_grid_pinpoints)
    anyres.check_pinpoints(pinpoints, side)
    if set(images.options.size.values()) != {side} or _extra_tokens(facts):
        raise ProcessorConfigError(
            f"Tiles of {side} pixels need size {side} as well, and no class token among their "
            "visual tokens."
        )
    grid = _patches(facts, side)
    return Sight(
        images,
        (side, side),
        grid**2,
        lambda width, height: anyres.lay_out(width, height, pinpoints, side, grid),
        lambda image: anyres.cut(image, pinpoints, side, resample),
        _token(facts),
    )


@PROCESSORS.register("PaliGemmaProcessor")
def _paligemma(facts: Facts) -> Sight:
    images = ImageProcessor(facts.kind, facts.images)
    side, model = picture_side(images, facts.model), facts.model
    there = None if model is None else (side // model.vision_config.patch_size) ** 2
    tokens = agreed("image_seq_length", facts.images.get("image_seq_length"), there)
    token, begin = Sight.token, facts.tokenizer.bos_token

    def prompt(text: str) -> str:
        images_end = text.rfind(token) + len(token) if token in text else 0
        return text[:images_end] + begin + text[images_end:] + "\n"

    return Sight(
        images,
        (side, side),
        tokens,
        _whole(tokens),
        inserted=True,
        prompt=prompt,
        special_tokens=False,
    )


def _longest_edge(name: str, value: Mapping[str, int]) -> int:
    """Of a size that says nothing else.

    Raises:
      ProcessorConfigError: if it does.
    """
    if set(value) != {"longest_edge"}:
        raise ProcessorConfigError(f"{name} is {value!r}: expected longest_edge, in pixels.")
    return value["longest_edge"]


@PROCESSORS.register("Idefics3Processor")
@PROCESSORS.register("SmolVLMProcessor")
def _idefics3(facts: Facts) -> Sight:
    options = dict(facts.images)
    longest = _longest_edge("size", options.pop("size", {"longest_edge": 4 * 364}))
    side = _longest_edge("max_image_size", options.pop("max_image_size", {"longest_edge": 364}))
    idefics3.check_longest(longest)
    split = options.pop("do_image_splitting", True)
    options.pop("do_pad", None)  # pads numbers of tiles, as is always done here
    options.pop("video_sampling", None)  # of SmolVLM's videos
    if not options.pop("do_resize", True):
        raise ProcessorConfigError("do_resize=False: images of Idefics3 are always scaled.")
    defaults = {"resample": PRESETS["idefics3"].resample}
    square = {"size": {"height": side, "width": side}}
    images = ImageProcessor("SiglipImageProcessor", defaults | options | square)
    picture_side(images, facts.model)  # the model's, or an error
    resample, model = images.options.resample, facts.model
    there = None
    if model is not None:
        there = (side // model.vision_config.patch_size) ** 2 // model.scale_factor**2
    tokens = agreed("image_seq_len", facts.processor.get("image_seq_len"), there)
    return Sight(
        images,
        (side, side),
        tokens,
        lambda width, height: idefics3.lay_out(width, height, longest, side, tokens, split),
        lambda image: idefics3.cut(image, longest, side, split, resample),
    )


@PROCESSORS.register("MllamaProcessor")
def _mllama(facts: Facts) -> Sight:
    options = dict(facts.images)
    tiles = options.pop("max_image_tiles", 4)
    for name in ("do_pad", "do_resize"):
        if not options.pop(name, True):
            raise ProcessorConfigError(f"{name}=False: images of Mllama are laid on a board.")
    images = ImageProcessor("ViTImageProcessor", {"do_convert_rgb": True} | options)
    side, resample = picture_side(images, facts.model), images.options.resample
    boards, vision = mllama.shapes(tiles), facts.model and facts.model.vision_config
    agreed("max_image_tiles", tiles, vision and vision.max_num_tiles)
    there = vision and tuple(map(tuple, vision.supported_aspect_ratios))
    agreed("the shapes of boards", boards, there)
    token, begin = "<|image|>", facts.tokenizer.bos_token

    def prompt(text: str) -> str:
        # Images come before the token of the beginning.
        rest = re.sub(f"^({re.escape(token)})*", "", text)
        return text if begin in text else text[: len(text) - len(rest)] + begin + rest

    return Sight(
        images,
        (side, side),
        len(boards),
        lambda width, height: mllama.lay_out(width, height, tiles, side),
        lambda image: mllama.cut(image, tiles, side, resample),
        token,
        prompt=prompt,
        frames=tiles,
    )


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a tokenizer puts before and after a text."""
    inner = tokenizer("a", add_special_tokens=False).input_ids
    whole, count = tokenizer("a").input_ids, len(inner)
    start = next(i for i in range(len(whole)) if whole[i : i + count] == inner)
    ends = whole[:start], whole[start + count :]
    before, after = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in ends)
    return before, after


@PROCESSORS.register("Blip2Processor")
def _blip2(facts: Facts) -> Sight:
    images = ImageProcessor(facts.kind, facts.images)
    side, model, token = picture_side(images, facts.model), facts.model, Sight.token
    if token not in facts.tokenizer.get_vocab():  # as in the first directories
        facts.tokenizer.add_tokens([token], special_tokens=True)
    key = "num_query_tokens"
    tokens = agreed(key, facts.processor.get(key), model and model.num_query_tokens)
    before, after = _ends(facts.tokenizer)

    def prompt(text: str) -> str:
        # Images come before the token of the beginning.
        rest = re.sub(f"^({re.escape(token)})*", "", text)
        return text[: len(text) - len(rest)] + before + rest + after

    return Sight(
        images,
        (side, side),
        tokens,
        _whole(tokens),
        inserted=True,
        prompt=prompt,
        special_tokens=False,
    )


@PROCESSORS.register("IdeficsProcessor")
def _idefics(facts: Facts) -> Sight:
    options = dict(facts.images)
    side = options.pop("image_size", None)  # as it was called first; it goes before `size`
    size = {} if side is None else {"size": {"height": side, "width": side}}
    channels = options.pop("image_num_channels", 3)
    if channels != 3:
        raise ProcessorConfigError(f"image_num_channels={channels}: pictures are RGB here, 3.")
    images = ImageProcessor("IdeficsImageProcessor", options | size)
    side = picture_side(images, facts.model)
    token, begin, around = Sight.token, facts.tokenizer.bos_token, idefics3.AROUND
    if facts.model is not None:
        model, here = facts.model, facts.tokenizer.get_vocab().get(token)
        # Ours say it; those of transformers do not.
        here = agreed(f"the id of {token!r}", here, model.to_dict().get("image_token_id"))
        count = model.vocab_size + model.additional_vocab_size
        if here >= count:
            raise ProcessorConfigError(
                f"The tokenizer has {token!r} at {here}, but the model has vectors for {count} "
                "tokens: they do not belong together."
            )

    def prompt(text: str) -> str:
        # Between images that follow each other there is one token, and around them no spaces.
        laid = re.sub(
            f" *((?:{token} *)+)",
            lambda run: around + run[1].count(token) * (token + around),
            text.strip(" "),
        )
        return begin + laid

    # Where an image is, one token stands; what it looks like is not in the text.
    return Sight(
        images,
        (side, side),
        1,
        _whole(1),
        prompt=prompt,
        special_tokens=False,
        id_field=None,
    )


@PROCESSORS.register("OpenFlamingoProcessor")  # as `mmjax.data.openflamingo` writes it
def _openflamingo(facts: Facts) -> Sight:
    images = ImageProcessor(facts.kind, facts.images)
    side = square_side(images)
    return Sight(images, (side, side), 1, _whole(1), id_field=None)


@PROCESSORS.register("ChameleonProcessor")
def _chameleon(facts: Facts) -> Sight:
    images, named = ImageProcessor(facts.kind, facts.images), facts.tokenizer.special_tokens_map
    side = there = None
    if facts.model is not None:
        vq = facts.model.vq_config
        side, there = vq.resolution, (vq.resolution // 2 ** (len(vq.channel_multiplier) - 1)) ** 2
    side = agreed("the size of pictures", square_side(images), side)
    key = "image_seq_length"
    tokens = agreed(key, facts.processor.get(key), there)
    begin, end = named.get("boi_token", "<racm3:break>"), named.get("eoi_token", "<eoss>")
    after = facts.tokenizer.sep_token or ""  # ends what a user says
    return Sight(
        images,
        (side, side),
        tokens,
        lambda width, height: Plan(1, (begin, np.arange(tokens, dtype=np.int32), end)),
        token=named.get("image_token", _token(facts)),
        prompt=lambda text: text + after,
    )


@PROCESSORS.register("Emu3Processor")
def _emu3(facts: Facts) -> Sight:
    options, named = dict(facts.images), facts.tokenizer.special_tokens_map
    options.pop("do_pad", None)  # pads images in a batch, as is always done here
    options.pop("size", None)  # repeats min_pixels and max_pixels
    grid = emu3.Grid(
        options.pop("spatial_factor", 8),
        options.pop("min_pixels", 512 * 512),
        options.pop("max_pixels", 1024 * 1024),
    )
    if facts.model is not None:
        levels = len(facts.model.vq_config.channel_multiplier)
        agreed("spatial_factor", grid.factor, 2 ** (levels - 1))
    if not options.pop("do_resize", True):
        raise ProcessorConfigError("do_resize=False: images of Emu3 are always scaled.")
    defaults = {"do_convert_rgb": True, "resample": Image.Resampling.BICUBIC}
    defaults |= {"image_mean": PRESETS["clip"].mean, "image_std": PRESETS["clip"].std}
    images = ImageProcessor("ViTImageProcessor", {**defaults, **options, "do_resize": False})
    return Sight(
        images,
        None,
        None,
        lambda width, height: grid.lay_out(
            width,
            height,
            named["boi_token"],
            named["image_wrapper_token"],
            named["eof_token"] + named["eoi_token"],
        ),
        lambda image: [grid.resized(image, images.options.resample)],
        named["image_token"],
        begin=facts.tokenizer.bos_token,
        grid=grid,
    )


@PROCESSORS.register("JanusProcessor")
def _janus(facts: Facts) -> Sight:
    options, named = dict(facts.images), facts.tokenizer.special_tokens_map
    least = options.pop("min_size", 14)
    options.pop("background_color", None)  # repeats image_mean
    for name in ("do_pad", "do_resize"):
        if not options.pop(name, True):
            raise ProcessorConfigError(f"{name}=False: images of Janus are fitted into squares.")
    images = ImageProcessor("BlipImageProcessor", options)
    side, resample = picture_side(images, facts.model), images.options.resample
    squared = _on_square(images.options.image_mean)
    key = "num_image_tokens"
    there = facts.model and getattr(facts.model.vision_config, key)
    tokens = agreed(key, facts.processor.get(key), there)
    begin, end = named["boi_token"], named["eoi_token"]
    system = facts.processor.get("use_default_system_prompt", False)
    return Sight(
        images,
        (side, side),
        # As many ids of codes follow the visual tokens, where an image is drawn.
        2 * tokens,
        lambda width, height: Plan(1, (begin, np.arange(tokens, dtype=np.int32), end)),
        lambda image: squared(janus.fitted(image, side, least, resample)),
        named["image_token"],
        prompt=lambda text: janus.prompted(text, begin) if system else text,
    )
