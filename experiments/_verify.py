"""A model of ours beside transformers on the same random inputs, layer by layer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from mmjax.convert import CONFIG
from mmjax.data import anyres
from mmjax.data.visual import TEXT as NO_PLACE
from mmjax.models import LM, T5, VLM, Flamingo, Mllama, NaFlexViT, T5Encoder, ViT, VLMConfig
from mmjax.models.clip import CLIP
from mmjax.models.siglip import NaFlexSigLIP, SigLIP
from mmjax.params import merge, split
from mmjax.patches import Patches
from mmjax.registry import Registry

LIMIT = 1e-4
BATCH, LENGTH = 2, 16

# BERT and the text towers, which are called alike.
TEXT = "text encoder"

# (name, ours, theirs)
Row = tuple[str, Any, Any]


def parity_table(model: nnx.Module, directory: Path) -> tuple[str, bool]:
    """The largest difference after every block and of every output, in float32 on the CPU.

    Args:
      model: ours, as `from_pretrained` gives it.
      directory: of the same model, for transformers to read.

    Returns:
      A table, and whether all differences are within 1e-4.

    Raises:
      ImportError: if PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "--verify runs the original with PyTorch: pip install torch (a CPU build will do)."
        ) from error
    import transformers

    architecture = json.loads((directory / CONFIG).read_text("utf-8"))["architectures"][0]
    loader = getattr(transformers, architecture)
    reference = loader.from_pretrained(directory, dtype=torch.float32).eval()
    kinds = (kind.__name__ for kind in type(model).__mro__)
    kind = next((kind for kind in kinds if kind in COMPARISONS), TEXT)
    rows = list(COMPARISONS[kind](model, reference))
    differences = [
        (name, float(np.abs(a - b).max()), float(np.abs(b).max())) for name, a, b in rows
    ]
    lines = [f"{'':28} {'largest difference':>20} {'largest value':>16}"]
    lines += [f"{name:28} {error:20.1e} {size:16.3g}" for name, error, size in differences]
    worst = max(error for _, error, _ in differences)
    agrees = bool(worst <= LIMIT)
    lines.append(
        f"{architecture}: largest difference {worst:.1e}, "
        + (f"within {LIMIT}." if agrees else f"ABOVE {LIMIT}: this conversion is not right.")
    )
    return "\n".join(lines), agrees


# By name of our class: (ours, theirs) -> rows.
COMPARISONS: Registry[Callable[[nnx.Module, Any], Iterator[Row]]] = Registry("comparison")


@COMPARISONS.register("LM")
def _lm(model: LM, reference: Any) -> Iterator[Row]:
    tokens = _tokens(model.config.vocab_size)
    depth = model.config.depth
    out = _jitted(model, LM.run, tokens, features=tuple(range(depth)))
    theirs = _call(reference, input_ids=tokens)
    yield from _blocks("block", out.features[:-1], theirs.hidden_states[1:-1])
    yield "logits", *_both(out.logits, theirs.logits)


@COMPARISONS.register("ViT")
def _vit(model: ViT, reference: Any) -> Iterator[Row]:
    yield from _image_rows(model, _call(reference, pixel_values=_pixels(model.config)))


@COMPARISONS.register("NaFlexViT")
def _naflex(model: NaFlexViT, reference: Any) -> Iterator[Row]:
    yield from _image_rows(model, _call(reference, **_naflex_inputs(model.config)))


@COMPARISONS.register(TEXT)
def _text(model: nnx.Module, reference: Any) -> Iterator[Row]:
    tokens = _tokens(_vocabulary(model))
    yield from _text_rows(model, tokens, _call(reference, input_ids=tokens))


@COMPARISONS.register("CLIP")
@COMPARISONS.register("SigLIP")
def _pair(model: CLIP | SigLIP, reference: Any) -> Iterator[Row]:
    yield from _pair_rows(model, reference, {"pixel_values": _pixels(model.config.image)})


@COMPARISONS.register("NaFlexSigLIP")
def _naflex_pair(model: NaFlexSigLIP, reference: Any) -> Iterator[Row]:
    yield from _pair_rows(model, reference, _naflex_inputs(model.config.image))


@COMPARISONS.register("T5Encoder")
def _t5_encoder(model: T5Encoder, reference: Any) -> Iterator[Row]:
    tokens = _tokens(model.config.vocab_size)
    out, blocks = _jitted(
        model, T5Encoder.encode, tokens, features=tuple(range(model.config.depth))
    )
    theirs = _call(reference, input_ids=tokens)
    yield from _blocks("encoder block", blocks[:-1], theirs.hidden_states[1:-1])
    yield "tokens", *_both(out, theirs.last_hidden_state)


@COMPARISONS.register("T5")
def _t5(model: T5, reference: Any) -> Iterator[Row]:
    config = model.config
    tokens, answer = _tokens(config.vocab_size), _tokens(config.vocab_size, seed=1)
    theirs = _call(reference, input_ids=tokens, decoder_input_ids=answer)

    def run(model: T5, tokens: Any, answer: Any) -> tuple[Any, ...]:
        encoded, first = model.encode(tokens, features=tuple(range(config.depth)))
        last = range(len(theirs.decoder_hidden_states) - 1)
        decoded, second = model.decode(encoded, answer, features=tuple(last))
        return first, encoded, second, model.logits(decoded)

    first, encoded, second, logits = _jitted(model, run, tokens, answer)
    # Of the last block transformers tells what its final norm makes of it.
    yield from _blocks("encoder block", first[:-1], theirs.encoder_hidden_states[1:-1])
    yield "encoder tokens", *_both(encoded, theirs.encoder_last_hidden_state)
    yield from _blocks("decoder block", second[:-1], theirs.decoder_hidden_states[1:-1])
    yield "logits", *_both(logits, theirs.logits)


@COMPARISONS.register("VLM")
def _vlm(model: VLM, reference: Any) -> Iterator[Row]:
    config, see = model.config, SEEING[type(reference).__name__]
    places, pictures = see.image(config, reference.config)
    text = _tokens(config.vocab_size)
    text = np.where(text == config.image_token, 0, text)
    image = np.full((BATCH, len(places)), config.image_token, np.int32)
    tokens = np.concatenate([image, text], axis=1)
    place = np.concatenate([np.broadcast_to(places, image.shape), np.full_like(text, NO_PLACE)], 1)
    pixels = np.stack([_pixels(config.encoder, seed) for seed in range(pictures)], axis=1)
    tower = getattr(reference.base_model, see.tower)
    yield from _image_rows(model.encoder, _call(tower, pixel_values=pixels[:, 0]), "image ")
    given = {"place": place}
    inputs = {"input_ids": tokens, **see.inputs(pixels, tokens)}
    if model.encoder_decoder:
        given["decoder_tokens"] = inputs["decoder_input_ids"] = _tokens(config.vocab_size, seed=1)

    def run(model: VLM, tokens: Any, images: Any, given: dict[str, Any]) -> Any:
        return model.run(tokens, images, **given).logits

    logits = _jitted(model, run, tokens, pixels.transpose(0, 1, 3, 4, 2), given)
    yield "logits", *_both(logits, _call(reference, **inputs).logits)


@COMPARISONS.register("Flamingo")
def _flamingo(model: Flamingo, reference: Any) -> Iterator[Row]:
    """An image, text that sees it, another image, and text that sees that one."""
    config = model.config
    tokens = _tokens(config.vocab_size)
    half = tokens.shape[1] // 2
    tokens = np.where(tokens == config.image_token, 0, tokens)
    tokens[:, [0, half]] = config.image_token
    pixels = np.stack([_pixels(config.encoder, seed) for seed in (0, 1)], axis=1)
    last = np.arange(tokens.shape[1])[:, None] // half == np.arange(2)
    last[2 * half :, 1] = True
    seen = np.broadcast_to(last.astype(np.int64), (len(tokens), *last.shape))
    logits = _jitted(model, Flamingo.__call__, tokens, pixels.transpose(0, 1, 3, 4, 2))
    theirs = _call(reference, input_ids=tokens, pixel_values=pixels, image_attention_mask=seen)
    yield "logits", *_both(logits, theirs.logits)


@COMPARISONS.register("Mllama")
def _mllama(model: Mllama, reference: Any) -> Iterator[Row]:
    """An image of one tile, text, and an image of as many as there may be, and text."""
    encoder = model.config.encoder
    tokens = _tokens(model.config.lm.vocab_size)
    half = tokens.shape[1] // 2
    tokens[:, [0, half]] = model.config.image_token
    counts = [math.prod(shape) for shape in encoder.shapes]
    shapes = np.array([counts.index(min(counts)), counts.index(max(counts))])
    there = np.arange(encoder.tiles) < np.array(counts)[shapes][:, None]
    pixels = np.stack([_pixels(encoder, seed) for seed in range(2 * encoder.tiles)], axis=1)
    pixels = np.where(there.reshape(-1)[:, None, None, None], pixels, 0)
    place = np.full(tokens.shape, NO_PLACE, np.int32)
    place[:, [0, half]] = np.arange(2) * len(encoder.shapes) + shapes
    seen = (np.arange(tokens.shape[1])[:, None] >= half) == np.arange(2)
    rows = len(tokens)
    logits = _jitted(
        model,
        Mllama.__call__,
        tokens,
        pixels.transpose(0, 1, 3, 4, 2),
        None,
        place=jax.numpy.asarray(place),
    )
    theirs = _call(
        reference,
        input_ids=tokens,
        pixel_values=pixels.reshape(rows, 2, encoder.tiles, *pixels.shape[2:]),
        aspect_ratio_ids=np.broadcast_to(shapes + 1, (rows, 2)),
        aspect_ratio_mask=np.broadcast_to(there.astype(np.int64), (rows, *there.shape)),
        cross_attention_mask=np.broadcast_to(
            (seen[:, :, None] & there).astype(np.int64), (rows, len(seen), *there.shape)
        ),
    )
    seen = np.broadcast_to(shapes + 1, (rows, 2))
    visual = _jitted(model, Mllama.encode_images, pixels.transpose(0, 1, 3, 4, 2), seen)
    features = reference.model.multi_modal_projector(theirs.image_outputs.last_hidden_state)
    yield "visual tokens", *_both(visual, features.detach().reshape(visual.shape))
    yield "logits", *_both(logits, theirs.logits)


class See(NamedTuple):
    """How a class of transformers is shown an image at the beginning of each text.

    Attributes:
      inputs: (pixels [B, pictures, C, H, W], tokens) -> what the class takes beside tokens.
      tower: the attribute that is the image tower.
      image: (config, theirs) -> the places of an image, and how many pictures it is.
    """

    inputs: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]
    tower: str = "vision_tower"
    image: Callable[[VLMConfig, Any], tuple[np.ndarray, int]] = lambda config, theirs: (
        np.arange(config.image_tokens),
        1,
    )


def _board(config: VLMConfig, theirs: Any) -> tuple[np.ndarray, int]:
    """Of an image so high that some of its board is left out."""
    side, grid = config.encoder.image_size, config.encoder.grid[0]
    plan = anyres.lay_out(side, 3 * side, theirs.image_grid_pinpoints, side, grid)
    return np.concatenate(plan.pieces), plan.pictures


def _board_inputs(pixels: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    side = pixels.shape[-1]
    return {"pixel_values": pixels, "image_sizes": np.array([[3 * side, side]] * len(pixels))}


def _one(pixels: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"pixel_values": pixels[:, 0]}


def _rows(pixels: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"pixel_values": pixels}


def _prefix(pixels: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
    return {"pixel_values": pixels[:, 0], "token_type_ids": np.zeros_like(tokens)}


# By name of the class in transformers.
SEEING: Registry[See] = Registry("comparison of models that see")
SEEING.register("LlavaForConditionalGeneration")(See(_one))
SEEING.register("LlavaNextForConditionalGeneration")(See(_board_inputs, image=_board))
SEEING.register("PaliGemmaForConditionalGeneration")(See(_prefix))
SEEING.register("Blip2ForConditionalGeneration")(See(_one, "vision_model"))
SEEING.register("Idefics3ForConditionalGeneration")(See(_rows, "vision_model"))
SEEING.register("SmolVLMForConditionalGeneration")(See(_rows, "vision_model"))


def _pair_rows(model: nnx.Module, reference: Any, images: dict[str, np.ndarray]) -> Iterator[Row]:
    tokens = _tokens(_vocabulary(model.text))
    theirs = _call(reference, input_ids=tokens, **images)
    inputs = _ours(model.config.image, images)
    yield from _image_rows(model.image, theirs.vision_model_output, "image ")
    yield from _text_rows(model.text, tokens, theirs.text_model_output, "text ")
    for name, function, argument, their in (
        ("image embedding", "encode_image", inputs, theirs.image_embeds),
        ("text embedding", "encode_text", tokens, theirs.text_embeds),
    ):
        yield name, *_both(_jitted(model, getattr(type(model), function), argument), their)
    logits = _jitted(model, type(model).__call__, inputs, tokens)
    yield "logits", *_both(logits, theirs.logits_per_image)


def _image_rows(tower: nnx.Module, theirs: Any, prefix: str = "") -> Iterator[Row]:
    depth = tower.config.depth
    naflex = isinstance(tower, NaFlexViT)
    images = _naflex_inputs(tower.config) if naflex else {"pixel_values": _pixels(tower.config)}
    inputs = _ours(tower.config, images)
    out = _jitted(tower, type(tower).__call__, inputs, features=tuple(range(depth)))
    if not naflex and tower.config.pre_norm:
        # CLIP's tokens have no final norm in transformers.
        out = out._replace(tokens=None)
    for name, ours, their in _encoder_rows(out, theirs, prefix):
        if naflex and ours.ndim == 3:  # what stands at padding is of no meaning
            ours, their = (x * inputs.mask[:, :, None] for x in (ours, their))
        yield name, ours, their


def _text_rows(
    tower: nnx.Module, tokens: np.ndarray, theirs: Any, prefix: str = ""
) -> Iterator[Row]:
    depth = len(theirs.hidden_states) - 1
    out = _jitted(tower, type(tower).__call__, tokens, features=tuple(range(depth)))
    yield from _encoder_rows(out, theirs, prefix)


def _encoder_rows(out: Any, theirs: Any, prefix: str) -> Iterator[Row]:
    """Blocks, tokens, and what else both have."""
    if prefix:
        # In a pair "pooled" is before the projection here, behind it there; embeddings follow.
        out = out._replace(pooled=None)
    yield from _blocks(f"{prefix}block", out.features, theirs.hidden_states[1:])
    for name, attributes in {
        "tokens": ("last_hidden_state",),
        "pooled": ("image_embeds", "text_embeds", "pooler_output"),
        "logits": ("logits",),
    }.items():
        ours = out._asdict().get(name)
        their = next((theirs[key] for key in attributes if theirs.get(key) is not None), None)
        if ours is not None and their is not None and tuple(ours.shape) == tuple(their.shape):
            yield prefix + name, *_both(ours, their)


def _blocks(name: str, ours: Any, theirs: Any) -> Iterator[Row]:
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} blocks of ours beside {len(theirs)} of theirs.")
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        yield f"{name} {index}", *_both(a, b)


def _both(ours: Any, theirs: Any) -> tuple[np.ndarray, np.ndarray]:
    ours, theirs = np.asarray(ours, np.float32), theirs.numpy()
    if ours.shape != theirs.shape:
        raise ValueError(f"A shape of {ours.shape} beside {theirs.shape} of transformers.")
    return ours, theirs


def _jitted(model: nnx.Module, function: Callable, *inputs: Any, **options: Any) -> Any:
    graph, arrays = split(model)
    return jax.jit(lambda arrays, inputs: function(merge(graph, arrays), *inputs, **options))(
        arrays, jax.tree.map(jax.numpy.asarray, inputs)
    )


def _call(reference: Any, **inputs: np.ndarray) -> Any:
    import torch

    tensors = {name: torch.tensor(np.asarray(x)) for name, x in inputs.items()}
    tensors = {n: x.long() if x.dtype == torch.int32 else x for n, x in tensors.items()}
    with torch.no_grad():
        return reference(**tensors, output_hidden_states=True, return_dict=True)


def _tokens(vocabulary: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (BATCH, LENGTH)).astype(np.int32)


def _vocabulary(tower: nnx.Module) -> int:
    config = tower.config
    return config.vocab_size if hasattr(config, "vocab_size") else config.bert.vocab_size


def _pixels(config: Any, seed: int = 0) -> np.ndarray:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (BATCH, config.channels, height, width)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _naflex_inputs(config: Any) -> dict[str, np.ndarray]:
    """Two images of different shapes."""
    shapes = np.array([[3, 5], [4, 2]], np.int32)
    count = int(shapes.prod(1).max())
    width = config.patch_size**2 * config.channels
    patches = np.random.default_rng(0).normal(size=(len(shapes), count, width))
    mask = np.arange(count)[None] < shapes.prod(1)[:, None]
    return {
        "pixel_values": (patches * mask[:, :, None]).astype(np.float32),
        "spatial_shapes": shapes,
        "pixel_attention_mask": mask.astype(np.int32),
    }


def _ours(config: Any, images: dict[str, np.ndarray]) -> Any:
    """The same images as our models take them."""
    if "spatial_shapes" not in images:
        return images["pixel_values"].transpose(0, 2, 3, 1)
    mask = images["pixel_attention_mask"].astype(bool)
    return Patches(images["pixel_values"], images["spatial_shapes"], mask)
