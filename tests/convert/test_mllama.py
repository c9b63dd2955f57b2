"""Mllama (Llama 3.2 Vision) of transformers, both ways, and its processor."""

import dataclasses
import json

import hf
import jax
import jax.numpy as jnp
import numpy as np
import parity
import processors
import pytest
from flax import nnx
from towers import QUICK, long, quick, refused, same_files, saved_without_origin
from vlms import NEW_TOKENS, Stream, forward, greedy

import mmjax
import mmjax.convert
from mmjax import params
from mmjax.convert.load import structure
from mmjax.convert.table import lay_out, rename
from mmjax.data.image_options import ProcessorConfigError
from mmjax.data.load_processor import load_processor
from mmjax.data.mllama import shapes
from mmjax.data.visual import LAYOUTS
from mmjax.generation import Generator
from mmjax.models import LM, Mllama
from mmjax.models.tiled_vit import SHAPES

transformers = hf.transformers()
pytestmark = pytest.mark.torch

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 4,
    "intermediate_size": 40,
    "image_size": 24,
    "patch_size": 8,
    "intermediate_layers_indices": [0, 2],
}
LANGUAGE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 36,
    "cross_attention_layers": [1, 3],
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
IMAGE_TOKEN = 50  # the first that the head has not
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name -> (options of the encoder and of the language model, runs of its blocks, rows)
# Rows have numbers of random tokens, and images by the shape of their board.
CASES = {
    # A pattern that repeats, as in the published models: 2 blocks, a gated one, 1 block.
    "as published": (
        {},
        {
            "num_hidden_layers": 8,
            "cross_attention_layers": [2, 6],
            "rope_parameters": LLAMA3,
        },
        (2, 1),
        ([3, (1, 2), 4, (2, 2), 5], [(3, 1), 2, (1, 1), 3], [1, (2, 1), (1, 4), 2]),
    ),
    "gated blocks first, last and together, one head for all": (
        {
            "image_size": 28,  # pixels that fill no patch
            "num_channels": 1,
            "hidden_act": "quick_gelu",
            "norm_eps": 1e-3,
            "intermediate_layers_indices": [-2, 0, 1],
        },
        {
            "hidden_size": 36,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "cross_attention_layers": [0, 2, 3, 6, 9],
            "num_hidden_layers": 7,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,  # which means nothing there
        },
        (0, 1, 0, 2, 0),
        ([2, (4, 1), 3], [(2, 2), 1]),
    ),
    "boards of up to two tiles": (
        {
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [1],
            "image_size": 16,
            "hidden_size": 24,
        },
        {
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "cross_attention_layers": [0],
            "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        },
        (0, 1),
        ([(1, 2), 2], [2, (2, 1), 3], [(1, 1), 4]),
    ),
}
MIXED = ([3, (1, 2), 4, (2, 2), 5], [6], [1, (2, 1), 2])


def config_for(name):
    vision, text, *_ = CASES[name]
    vision = VISION | vision
    width = vision["hidden_size"] * (1 + len(vision["intermediate_layers_indices"]))
    return transformers.MllamaConfig(
        vision_config=vision | {"vision_output_dim": width},
        text_config=LANGUAGE | text,
        image_token_index=IMAGE_TOKEN,
    )


def stream(config, rows, seed=0):
    """Rows padded on the left."""
    rng = np.random.default_rng(seed)
    boards, tiles = config.encoder.shapes, config.frames
    side = config.encoder.image_size
    tile = (side, side, config.encoder.channels)
    laid = []
    for row in rows:
        tokens, places, images = [], [], []
        for item in row:
            if isinstance(item, int):
                tokens += rng.integers(3, IMAGE_TOKEN, item).tolist()
                places += [-1] * item
                continue
            tokens.append(IMAGE_TOKEN)
            places.append(len(images) * len(boards) + boards.index(item))
            images.append(np.zeros((tiles, *tile), np.float32))
            count = item[0] * item[1]
            images[-1][:count] = rng.normal(size=(count, *tile))
        laid.append((tokens, places, images))
    length, count = (max(len(row[part]) for row in laid) for part in (0, 2))
    out = Stream(
        np.zeros((len(rows), length), np.int32),
        np.zeros((len(rows), length), bool),
        np.full((len(rows), length), -1, np.int32),
        np.zeros((len(rows), count * tiles, *tile), np.float32),
        [],
    )
    for index, (tokens, places, images) in enumerate(laid):
        start = length - len(tokens)
        out.tokens[index, start:], out.place[index, start:] = tokens, places
        out.mask[index, start:] = True
        if images:
            out.images[index, : len(images) * tiles] = np.concatenate(images)
    return out


def theirs(config, batch):
    """What their model is called with, masks made by their processor's functions."""
    import torch
    from transformers.models.mllama import image_processing_pil_mllama as image_module
    from transformers.models.mllama import processing_mllama as module

    given = {"input_ids": long(batch.tokens), "attention_mask": long(batch.mask)}
    boards, tiles = config.encoder.shapes, config.frames
    found = [
        [boards[place % len(boards)] for place in row[row >= 0].tolist()] for row in batch.place
    ]
    if not any(found):
        return given
    assert len({len(row) for row in found}) == 1, "there, a row depends on its neighbours'"
    counts = [[down * across for down, across in row] for row in found]
    spans = [module.get_cross_attention_token_mask(r, IMAGE_TOKEN) for r in batch.tokens.tolist()]
    dense = module.convert_sparse_cross_attention_mask_to_dense
    pixels = batch.images.reshape(len(batch.images), -1, tiles, *batch.images.shape[2:])
    return given | {
        "pixel_values": torch.tensor(pixels.transpose(0, 1, 2, 5, 3, 4)),
        "aspect_ratio_ids": long(np.array([[1 + boards.index(b) for b in row] for row in found])),
        "aspect_ratio_mask": long(image_module.build_aspect_ratio_mask_np(found, tiles)),
        "cross_attention_mask": long(dense(spans, counts, tiles, batch.tokens.shape[1])),
    }


def generated(reference, inputs):
    # Their cache takes what the first layer remembers for the length of the text.
    cached = 0 not in reference.config.text_config.cross_attention_layers
    return reference.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, use_cache=cached
    ).numpy()[:, -NEW_TOKENS:]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Their model with random weights and gates, its directory, and ours."""
    reference = transformers.MllamaForConditionalGeneration(config_for("as published"))
    source = parity.save_hf(reference, tmp_path_factory.mktemp("mllama") / "source")
    gates = [p for name, p in reference.named_parameters() if "gate" in name and p.numel() == 1]
    assert len(gates) == 2 * 2 + 2 * 2 + 3 and min(abs(gate.item()) for gate in gates) > 0
    return reference, source, mmjax.convert.from_pretrained(source)


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, tmp_path):
    import torch

    reference = transformers.MllamaForConditionalGeneration(config_for(name))
    source = parity.save_hf(reference, tmp_path / "source")
    model = mmjax.convert.from_pretrained(source)
    assert model.config.runs == CASES[name][2]
    batch = stream(model.config, CASES[name][3])
    inputs = theirs(model.config, batch)
    with torch.no_grad():
        expected = reference(**inputs).logits
        written = generated(reference, inputs)
    logits = forward(model, batch.tokens, batch.images, batch.mask, place=batch.place)
    family = "MllamaForConditionalGeneration"
    parity.close(family, "logits", logits, expected, batch.mask)
    parity.same_argmax(logits, expected, batch.mask)
    np.testing.assert_array_equal(greedy(model, batch), written)
    parity.check_round_trip(source, tmp_path / "target", lambda model: model(**inputs).logits)
    same_files(source, tmp_path / "target")
    saved_without_origin(model, source, tmp_path / "no_origin")


def test_gradients(tmp_path):
    import torch

    reference = transformers.MllamaForConditionalGeneration(config_for("boards of up to two tiles"))
    model = mmjax.convert.from_pretrained(parity.save_hf(reference, tmp_path / "source"))
    batch = stream(model.config, CASES["boards of up to two tiles"][3])
    graph, arrays = params.split(model)
    shape = (*batch.tokens.shape, model.config.lm.vocab_size)
    weights = np.random.default_rng(1).normal(size=shape) * batch.mask[:, :, None]

    def loss(arrays):
        logits = params.merge(graph, arrays)(
            jnp.asarray(batch.tokens),
            jnp.asarray(batch.images),
            jnp.asarray(batch.mask),
            place=jnp.asarray(batch.place),
        )
        return jnp.sum(weights * logits)

    slopes = jax.jit(jax.grad(loss), compiler_options=QUICK)(arrays)
    logits = reference(**theirs(model.config, batch)).logits
    (torch.tensor(weights) * logits).sum().backward()
    parity.check_gradients("MllamaForConditionalGeneration", model, slopes, reference)


def test_rows_of_different_images(published):
    """Each row is as it is alone there: where rows have unequal numbers of images, or none, what
    theirs makes of one depends on the others."""
    import torch

    reference, _, model = published
    batch = stream(model.config, MIXED)
    logits = forward(model, batch.tokens, batch.images, batch.mask, place=batch.place)
    rows = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]
    places = [row[mask].tolist() for row, mask in zip(batch.place, batch.mask, strict=True)]
    counts = [model.config.frames * int((row >= 0).sum()) for row in batch.place]
    images = [row[:count] for row, count in zip(batch.images, counts, strict=True)]
    ours = Generator(model)(rows, images, place=places, max_new_tokens=NEW_TOKENS).tokens
    for index, count in enumerate(counts):
        one = Stream(*(part[index : index + 1] for part in batch[:4]), [])
        one = one._replace(images=one.images[:, :count])
        here = batch.mask[index]
        one = one._replace(
            tokens=one.tokens[:, here], mask=one.mask[:, here], place=one.place[:, here]
        )
        inputs = theirs(model.config, one)
        with torch.no_grad():
            expected = reference(**inputs).logits
            written = generated(reference, inputs)
        parity.close(
            "MllamaForConditionalGeneration", "logits", logits[index : index + 1, here], expected
        )
        np.testing.assert_array_equal(ours[index : index + 1], written)


def test_published_size():
    """Of 11 billion parameters: names and shapes, without the weights."""
    import torch

    config = transformers.MllamaConfig()
    with torch.device("meta"):
        reference = transformers.MllamaForConditionalGeneration(config)
    shapes = {name: tuple(x.shape) for name, x in reference.named_parameters()}
    family = mmjax.convert.family.families()["MllamaForConditionalGeneration"]
    ours = family.from_hf(mmjax.convert.Source(config, frozenset(), None))
    assert ours.runs == (3, 1) and ours.lm.depth == 32
    entries = lay_out(family.rows(ours), structure(Mllama, ours)[1])
    names = rename(shapes, family.renames, "")
    expected = {canonical: shapes[name] for canonical, name in names.items()}
    assert {entry.name: tuple(entry.shape) for entry in entries} == expected


def changed(model, arrays=None, **fields):
    """The model with other fields of its config, or parameters."""
    graph, _ = params.abstract(
        lambda: Mllama(dataclasses.replace(model.config, **fields), rngs=nnx.Rngs(0))
    )
    return params.merge(graph, params.split(model)[1] | (arrays or {}))


def seen(model, place):
    """What each token sees by the mask, [B, T, I, tiles], and whether it looks at an image."""
    boards = model.config.encoder.shapes
    number, shape = np.where(place < 0, -1, (place // len(boards), place % len(boards)))
    counts = np.array([down * across for down, across in boards])
    there = np.zeros((len(place), number.max() + 1, model.config.frames), bool)
    for row, (numbers, kinds) in enumerate(zip(number, shape, strict=True)):
        for image, kind in zip(numbers[numbers >= 0], kinds[numbers >= 0], strict=True):
            there[row, image] = np.arange(there.shape[2]) < counts[kind]
    mask, looks = model._seen(jnp.asarray(number), jnp.asarray(there), None, None)
    dense = np.asarray(mask.dense()).reshape(*place.shape, *there.shape[1:], -1)
    assert (dense == dense[..., :1]).all()
    return dense[..., 0], np.asarray(looks)


def test_who_sees_what(published):
    """The mask is theirs, but for what no image comes before."""
    model = published[2]
    rows = ([2, (1, 2), (2, 2), 3, (2, 1), 2], [(1, 1), (1, 1), 1, (3, 1), 4])
    batch = stream(model.config, rows)
    wanted = theirs(model.config, batch)["cross_attention_mask"].numpy().astype(bool)
    for early in ("none", "all"):
        mask, looks = seen(changed(model, early=early), batch.place)
        np.testing.assert_array_equal(looks, wanted.any((2, 3)))
        first = (early == "all") & ~looks[:, :, None, None]
        np.testing.assert_array_equal(mask, wanted | first)


def test_text_before_an_image(published):
    """It is not affected by what comes; in transformers it attends to it, and so it does here in
    models that are read from there."""
    model = published[2]
    batch = stream(model.config, ([3, (1, 2), 4, (2, 2), 5],) * 3)
    images = batch.images
    images[1], images[2] = images[0], images[0]
    tokens, place = (np.repeat(x[:1], 3, axis=0) for x in (batch.tokens, batch.place))
    images[1, 0], images[2, 4] = 1.0, 1.0  # a tile of the first, and of the second
    differs = {}
    for early in ("none", "all"):
        other = changed(model, early=early)
        logits = np.asarray(forward(other, tokens, images, batch.mask, place=place))
        differs[early] = np.abs(logits[1:] - logits[:1]).max(-1) > 1e-6
    starts = np.array([[3], [8]])
    np.testing.assert_array_equal(differs["none"], np.arange(tokens.shape[1]) >= starts)
    assert differs["all"].all()


def test_what_early_text_sees_is_not_saved(published, tmp_path):
    """Directories have no field for it: models of either kind are saved, and read as theirs."""
    model = published[2]
    name = model.origin.architecture
    mmjax.save_pretrained(changed(model, early="none"), tmp_path / "new", architecture=name)
    assert mmjax.from_pretrained(tmp_path / "new").config == model.config


def test_gates_at_zero_leave_the_language_model(published):
    model = published[2]
    arrays = params.split(model)[1]
    closed = {
        path: jnp.zeros_like(x)
        for path, x in arrays.items()
        if path.startswith("gated/") and path.endswith("_gate")
    }
    assert len(closed) == 2
    batch = stream(model.config, CASES["as published"][3])
    tokens = np.where(batch.place >= 0, 7, batch.tokens)
    logits = forward(changed(model, closed), tokens, batch.images, batch.mask, place=batch.place)
    bare = quick(model.lm, jnp.asarray(tokens), jnp.asarray(batch.mask))
    np.testing.assert_allclose(logits, bare, atol=1e-6)
    assert isinstance(model.lm, LM)
    without = forward(model, tokens, None, batch.mask)
    np.testing.assert_allclose(without, bare, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda hf: setattr(hf.vision_config, "vision_output_dim", 64), "vision_output_dim=64"),
        (lambda hf: setattr(hf.vision_config, "image_size", [24, 16]), "equal height and width"),
        (lambda hf: setattr(hf.vision_config, "max_num_tiles", 3), "1 to tiles=3 tiles"),
        (lambda hf: setattr(hf.text_config, "cross_attention_layers", [9]), r"looks=\(\)"),
        (lambda hf: setattr(hf.text_config, "head_dim", 8), "head_dim=8 with 4 heads"),
    ],
)
def test_refused(change, message):
    config = config_for("as published")
    change(config)
    with pytest.raises(ValueError, match=message):
        refused("MllamaForConditionalGeneration", config)


def test_images_without_places_are_refused(published):
    with pytest.raises(ValueError, match="`place` says which an image has"):
        published[2](jnp.array([[IMAGE_TOKEN, 4]]), jnp.zeros((1, 4, 24, 24, 3)))


def test_a_directory_in_the_commands(tmp_path, capsys):
    """`experiments.generate` writes what theirs does; `experiments.convert --verify` agrees."""
    import torch

    from experiments import convert, generate

    processor, directory = saved_processor(tmp_path / "whole")
    config = config_for("as published")
    config.text_config.vocab_size = config.image_token_index = processor.image_token_id
    config.vision_config.image_size = 16
    reference = hf.randomise(transformers.MllamaForConditionalGeneration(config))
    with torch.no_grad():  # special tokens would not be seen in the text
        reference.lm_head.weight[: len(processors.SPECIAL)] = 0
    reference.save_pretrained(directory)
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for file, image in zip(files, IMAGES[0], strict=True):
        image.save(file)
    prompt = ["--prompt", "user : <image> a red <image> dog", "--max-new-tokens", str(NEW_TOKENS)]
    shown = [part for file in files for part in ("--image", str(file))]
    assert generate.main(["--weights", str(directory), *shown, *prompt]) == 0
    inputs = processor(images=IMAGES[:1], text=TEXTS[:1], return_tensors="pt")
    expected = generated(reference, inputs)[0]
    decoded = processor.tokenizer.decode(expected, skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == decoded.strip() != ""
    assert convert.main(["--source", str(directory), "--verify"]) == 0
    table = capsys.readouterr().out
    assert "visual tokens" in table and "within 0.0001" in table


# One tile, small and large; boards of two, three and four, enlarged and shrunk; none.
IMAGES = [
    [processors.picture(0, 20, 13), processors.picture(1, 61, 20)],
    [processors.picture(2, 15, 70), processors.picture(3, 90, 80), processors.picture(4, 16, 16)],
    [processors.picture(5, 9, 200)],
]
TEXTS = [
    "user : <|image|> a red <|image|> dog",
    "<|image|><|image|> a <|image|> cat",
    "<|image|> <s> a red cat",
]
OPTIONS = {
    "as published": {},
    "two tiles": {"max_image_tiles": 2, "image_mean": [0.1, 0.2, 0.3], "resample": 3},
}


def saved_processor(directory, **options):
    defaults = {"size": {"height": 16, "width": 16}}
    theirs = transformers.MllamaProcessor(
        transformers.MllamaImageProcessorPil(**defaults | options),
        processors.tokenizer("<|image|>", "<|python_tag|>"),
    )
    return theirs, processors.save(directory, theirs)


@pytest.mark.parametrize("name", OPTIONS)
def test_processor(name, tmp_path, published):
    """Ids, pixels, numbers of boards, and masks by what the model makes of these."""
    reference, directory = saved_processor(tmp_path, **OPTIONS[name])
    processor = load_processor(directory)
    batch = processor(images=IMAGES, text=TEXTS)
    wanted = reference(
        images=IMAGES, text=TEXTS, padding=True, padding_side="left", return_tensors="np"
    )
    tiles = processor.sight.frames
    np.testing.assert_array_equal(batch["tokens"], wanted["input_ids"])
    np.testing.assert_array_equal(batch["mask"], wanted["attention_mask"].astype(bool))
    pixels = wanted["pixel_values"].transpose(0, 1, 2, 4, 5, 3)
    np.testing.assert_array_equal(batch["images"], pixels.reshape(batch["images"].shape))
    boards = shapes(tiles)
    ids = np.zeros_like(wanted["aspect_ratio_ids"])
    for row, place in zip(ids, batch["place"], strict=True):
        number, shape = np.divmod(place[place >= 0], len(boards))
        np.testing.assert_array_equal(number, np.arange(len(number)))
        row[: len(number)] = shape + 1
    np.testing.assert_array_equal(ids, wanted["aspect_ratio_ids"])
    np.testing.assert_array_equal(batch["place"] >= 0, batch["tokens"] == processor.token_id)
    if boards == SHAPES:
        mask, _ = seen(changed(published[2], early="none"), batch["place"])
        np.testing.assert_array_equal(mask, wanted["cross_attention_mask"].astype(bool))
    flat = processor(images=[image for group in IMAGES for image in group], text=TEXTS)
    for key, value in flat.items():
        np.testing.assert_array_equal(value, batch[key], err_msg=key)


def test_chat(tmp_path):
    reference, _ = saved_processor(tmp_path / "plain")
    reference.chat_template = processors.TEMPLATE.replace("<image>", "<|image|>")
    processor = load_processor(processors.save(tmp_path / "chat", reference))
    parts = [{"type": "image", "image": image} for image in IMAGES[0]]
    parts.append({"type": "text", "text": "a red dog"})
    chat = [{"role": "user", "content": parts}]
    batch = processor.apply_chat_template(chat, add_generation_prompt=True)
    wanted = reference.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="np"
    )
    np.testing.assert_array_equal(batch["tokens"], wanted["input_ids"])
    pixels = wanted["pixel_values"].transpose(0, 1, 2, 4, 5, 3)
    np.testing.assert_array_equal(batch["images"], pixels.reshape(batch["images"].shape))


def test_layout():
    """Boards and pictures of images of many shapes."""
    for tiles in (1, 2, 4, 6):
        theirs = transformers.MllamaImageProcessorPil(
            size={"height": 16, "width": 16},
            max_image_tiles=tiles,
            image_mean=(0.48145466, 0.4578275, 0.40821073),
            image_std=(0.26862954, 0.26130258, 0.27577711),
        )
        layout = LAYOUTS["mllama"]("mllama", 16, tiles)
        for width, height in (
            (16, 16),
            (100, 3),
            (3, 100),
            (33, 32),
            (32, 33),
            (48, 16),
            (1, 700),
            (7, 5),
        ):
            image = processors.picture(width, width, height)
            wanted = theirs([[image]], return_tensors="np")
            plan = layout.plan(width, height)
            assert plan.pictures == layout.frames == tiles and plan.tokens == 1
            assert plan.pieces[0].tolist() == [wanted["aspect_ratio_ids"][0, 0] - 1]
            pixels = wanted["pixel_values"][0, 0].transpose(0, 2, 3, 1)
            np.testing.assert_allclose(layout.pictures(image), pixels, atol=1e-6)
    assert shapes(4) == SHAPES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "do_resize=False"),
        ({"size": {"shortest_edge": 9}}, "squares of one size"),
        ({"max_image_tiles": 3}, "max_image_tiles is 3"),
    ],
)
def test_processors_that_are_refused(change, message, tmp_path):
    _, directory = saved_processor(tmp_path)
    config = config_for("as published")
    config.vision_config.image_size, config.image_token_index = 16, 14
    config.save_pretrained(directory)
    load_processor(directory)
    path = directory / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ProcessorConfigError, match=message):
        load_processor(directory)
