"""Emu3, both ways: logits, gradients, generation of text and images; its language model alone."""

import dataclasses
import json
import re
import shutil

import hf
import numpy as np
import parity
import processors
import pytest
import unified
from towers import long, pixels, quick, refused, same_files
from vlms import LANGUAGE, forward

import mmjax
import mmjax.convert
from mmjax.data.emu3 import Grid
from mmjax.data.image import CorruptImageError
from mmjax.data.load_processor import load_processor
from mmjax.data.visual import TEXT
from mmjax.models import LM, Unified

transformers = hf.transformers()
pytestmark = pytest.mark.torch

CODES = 20
TOKENIZER = {
    **{"base_channels": 32, "codebook_size": CODES, "num_res_blocks": 1, "hidden_size": 32},
    **{"channel_multiplier": [1, 1], "attn_resolutions": [], "temporal_downsample_factor": 1},
}
# Ids of text are 8 to 20.
WORDS = (8, 20)
MARKS = {"<|image token|>": 3, "<|extra_201|>": 7, "<|extra_200|>": 6}
AROUND = {"<image>": 5, "<|image start|>": 21, "<|image end|>": 2}
ORDER = np.random.default_rng(3).permutation(CODES)


def vocabulary(order=ORDER, first=25):
    """Codes whose ids are in this order, among other names."""
    codes = {f"<|visual token {code:06d}|>": first + int(at) for code, at in enumerate(order)}
    return {"word": 9, **MARKS, **AROUND, **codes}


def text_config(**changes):
    # Here the ids of padding and of the beginning must be numbers.
    options = LANGUAGE | {"pad_token_id": 0, "bos_token_id": 1}
    return transformers.Emu3TextConfig(**options | changes)


def config(*, text=(), tokenizer=(), **changes):
    options = {
        "text_config": text_config(**dict(text)),
        "vq_config": transformers.Emu3VQVAEConfig(**TOKENIZER | dict(tokenizer)),
        "vocabulary_map": vocabulary(),
    }
    return transformers.Emu3Config(**options | changes)


# name -> options, and the size of the images.
CASES = {
    "grouped heads": ({}, (4, 6)),
    "biases, codes in order": (
        {
            "text": {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
            "vocabulary_map": vocabulary(range(CODES), first=30),
        },
        (6, 4),
    ),
    "one head of keys, tied, narrow": (
        {
            "text": {
                **{"num_key_value_heads": 1, "hidden_size": 24, "num_attention_heads": 3},
                **{"num_hidden_layers": 3, "hidden_act": "gelu"},
            },
            "tokenizer": {"attn_resolutions": [1], "temporal_downsample_factor": 2},
            "tie_word_embeddings": True,
        },
        (4, 6),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_generation(name, tmp_path):
    options, size = CASES[name]
    reference = transformers.Emu3ForConditionalGeneration(config(**options))
    index = list(CASES).index(name)
    unified.check(
        reference,
        tmp_path,
        lambda ours: unified.stream(ours, size=size, words=WORDS, seed=index),
        lambda inputs: reference.model.get_image_tokens(
            inputs["pixel_values"], inputs["image_sizes"]
        ),
        unified.sizes,
        derived=index != 1,
        generator=index == 0,
        gradients=index == 1,
        origin=index != 2,
    )


def test_images_of_several_sizes(tmp_path):
    """They are padded to the largest, and their places are those of the codes that count."""
    import torch

    reference = transformers.Emu3ForConditionalGeneration(config())
    model = mmjax.convert.from_pretrained(parity.save_hf(reference, tmp_path / "theirs"))
    sizes, largest = [(4, 6), (6, 2), (8, 4)], (8, 6)
    padded = np.zeros((3, *largest, 3), np.float32)
    for index, (height, width) in enumerate(sizes):
        padded[index, :height, :width] = pixels(height, width, 3, seed=index)
    columns = largest[1] // 2 + 1
    tokens, place = [], []
    for number, (height, width) in enumerate(sizes):
        rows = np.arange(height // 2)[:, None] * columns
        # Codes of its own columns, then the end of the row.
        codes = rows + np.append(np.arange(width // 2), columns - 1)
        codes = codes.reshape(-1) + number * largest[0] // 2 * columns
        tokens += [9, MARKS["<|image token|>"], *[AROUND["<image>"]] * len(codes), 7, 2]
        place += [TEXT, TEXT, *codes, TEXT, TEXT]
    tokens, place = np.array([tokens], np.int32), np.array([place], np.int32)
    x = torch.tensor(padded.transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = reference(input_ids=long(tokens), pixel_values=x, image_sizes=long(sizes)).logits
        ids = reference.model.get_image_tokens(x, long(sizes))

    def run(model, tokens, images, place):
        return model.run(tokens, images, place=place)

    out = quick(model, tokens, padded[None], place, function=run)
    np.testing.assert_array_equal(out.tokens[place >= 0], ids)
    parity.close("Emu3ForConditionalGeneration", "logits", out.logits, expected)


def test_images_are_drawn(tmp_path):
    """Greedily, with guidance, under the grammar of its streams; and the pixels of their codes."""
    import torch

    reference = transformers.Emu3ForConditionalGeneration(config())
    model = mmjax.convert.from_pretrained(parity.save_hf(reference, tmp_path / "theirs"))
    height, width = 3, 4
    start, wrapper = [AROUND["<|image start|>"], 10, 11], MARKS["<|image token|>"]
    prompts = [[9, 12, 13, *start, wrapper], [14, *start, wrapper]]
    negative = [[15, 16, *start, wrapper], [17, *start, wrapper]]
    tokens, mask = left_padded(prompts)
    other, other_mask = left_padded(negative)
    visual = sorted(number for name, number in vocabulary().items() if "visual" in name)
    ends = [MARKS["<|extra_201|>"], AROUND["<|image end|>"], 0]

    def allowed(row, ids):
        """As the documentation of transformers has it."""
        since = len(ids) - int(torch.nonzero(ids == wrapper)[0, 0])
        after = since - height * (width + 1) - 1
        if after >= 0:
            return [ends[after]]
        return [MARKS["<|extra_200|>"]] if since % (width + 1) == 0 else visual

    count = height * (width + 1) + len(ends)
    with torch.no_grad():
        written = reference.generate(
            input_ids=long(tokens),
            attention_mask=long(mask),
            max_new_tokens=count,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
            guidance_scale=3.0,
            negative_prompt_ids=long(other),
            negative_prompt_attention_mask=long(other_mask),
            pad_token_id=0,
            eos_token_id=None,
        )[:, -count:]
        drawn = reference.decode_image_tokens(image_tokens=written, height=height, width=width)
    painter = model.sized(2 * height, 2 * width).following("grammar")
    ours = mmjax.generate(
        painter, prompts, guidance=3.0, negative=negative, max_new_tokens=count - 2
    )
    np.testing.assert_array_equal(ours, written[:, :-2])
    assert len(np.unique(ours)) > 4, "codes that are all the same show nothing"
    images = quick(painter, ours[:, :-1], function=Unified.images_of)
    parity.close("Emu3ForConditionalGeneration", "images", images, drawn.permute(0, 2, 3, 1))


def left_padded(rows):
    """Ids [B, T] and their mask."""
    length = max(map(len, rows))
    mask = np.array([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    tokens = np.array([[0] * (length - len(row)) + row for row in rows], np.int32)
    return tokens, mask


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "num_key_value_heads": 1},
        {"mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    ],
)
def test_language_model_alone(changes, tmp_path):
    import torch

    reference = transformers.Emu3ForCausalLM(text_config(**changes))
    directory = parity.save_hf(reference, tmp_path / "theirs")
    model = mmjax.convert.from_pretrained(directory)
    assert isinstance(model, LM)
    tokens, mask = left_padded([[8, 9, 30, 11, 5], [40, 3]])
    inputs = {"input_ids": long(tokens), "attention_mask": long(mask)}
    with torch.no_grad():
        expected = reference(**inputs).logits
    parity.close("Emu3ForCausalLM", "logits", forward(model, tokens, mask), expected, mask)
    parity.check_round_trip(directory, tmp_path / "ours", lambda model: model(**inputs).logits)
    same_files(directory, tmp_path / "ours")
    parity.check_saving_without_origin(directory, tmp_path / "alone")


NAMED = {
    **{"image_token": "<image>", "boi_token": "<|image start|>", "eoi_token": "<|image end|>"},
    **{"image_wrapper_token": "<|image token|>", "eof_token": "<|extra_201|>"},
}
PICTURES = [
    [processors.picture(0, 30, 20)],
    [processors.picture(1, 9, 14), processors.picture(2, 40, 11)],
    [],
]
TEXTS = ["a red <image> dog", "<image> a <image> ; cat", "bot : !"]


def their_processor():
    """Small images."""
    visual = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    tokenizer = processors.tokenizer(
        *"123456789*", *NAMED.values(), "<|extra_200|>", *visual, extra_special_tokens=NAMED
    )
    images = transformers.Emu3ImageProcessor(
        min_pixels=700, max_pixels=2000, image_mean=[0.4, 0.5, 0.6]
    )
    return transformers.Emu3Processor(images, tokenizer)


@pytest.fixture(scope="module")
def processor_directory(tmp_path_factory):
    """A processor with a model of its tokens, as transformers writes them."""
    directory, theirs = tmp_path_factory.mktemp("emu3"), their_processor()
    vocabulary_map = theirs.tokenizer.get_vocab()
    whole = config(
        text={"vocab_size": len(vocabulary_map)},
        tokenizer={"channel_multiplier": [1, 1, 1, 1]},  # 8 x 8 pixels a code
        vocabulary_map=vocabulary_map,
    )
    reference = transformers.Emu3ForConditionalGeneration(whole)
    processors.save(parity.save_hf(reference, directory), theirs)
    return directory, theirs, reference


def test_processor(processor_directory):
    """Pictures keep their shapes, and are padded to the largest."""
    directory, theirs, _ = processor_directory
    batch = processors.check(directory, theirs, PICTURES, TEXTS)
    assert batch["images"].shape == (3, 2, 40, 56, 3)
    processor = load_processor(directory)
    given = {"images": PICTURES[0], "text": TEXTS[0]}
    begun, alone = processor(**given), processor(**given, add_special_tokens=False)
    # One token of the beginning is the tokenizer's, one the processor's.
    np.testing.assert_array_equal(alone["tokens"], begun["tokens"][:, 2:])
    assert (begun["tokens"][:, :2] == theirs.tokenizer.bos_token_id).all()
    wanted = theirs(**given, return_tensors="np")
    np.testing.assert_array_equal(begun["tokens"], wanted["input_ids"])
    assert begun["images"].shape[2:4] == tuple(wanted["image_sizes"][0])
    with pytest.raises(CorruptImageError, match="201 x 1 pixels has too unequal sides"):
        processor(images=[processors.picture(0, 201, 1)], text="<image>")


@pytest.mark.parametrize(("least", "most", "factor"), [(700, 2000, 4), (512**2, 1024**2, 8)])
def test_sizes_of_images(least, most, factor):
    from transformers.models.emu3.image_processing_emu3 import smart_resize

    grid = Grid(factor, least, most)
    sides = np.random.default_rng(0).integers(1, 2000, (300, 2)).tolist()
    sides += [[1, 200], [factor // 2, 3 * factor // 2], [factor, factor], [24, 25], [1024, 1024]]
    compared = 0
    for height, width in sides:
        if max(height, width) <= 200 * min(height, width):
            expected = smart_resize(height, width, factor, least, most)
            assert grid.fitted(width, height) == expected, (height, width)
            compared += 1
    assert compared > 250


def test_what_the_processor_makes_the_model_reads(processor_directory):
    import torch

    directory, theirs, reference = processor_directory
    model, processor = mmjax.convert.from_pretrained(directory), load_processor(directory)
    batch = processor(images=PICTURES, text=TEXTS)
    flat = [image for group in PICTURES for image in group]
    inputs = theirs(images=flat, text=TEXTS, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        expected = reference(**inputs).logits
    options = [batch[name] for name in ("tokens", "images", "mask", "place")]
    out = quick(model, *options, function=lambda model, *x: model.run(*x[:3], place=x[3]))
    parity.close("Emu3ForConditionalGeneration", "logits", out.logits, expected, batch["mask"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spatial_factor": 4}, r"spatial_factor is 4 .* and 8 in config.json"),
        ({"do_resize": False}, "do_resize=False: images of Emu3"),
        ({"do_centre_crop": True}, "did you mean 'do_center_crop'"),
    ],
)
def test_processors_that_do_not_fit(changes, message, processor_directory, tmp_path):
    directory = shutil.copytree(processor_directory[0], tmp_path / "changed")
    path = directory / "processor_config.json"
    content = json.loads(path.read_text())
    content["image_processor"] |= changes
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_processor(directory)


def test_what_is_not_supported():
    names = vocabulary()
    wrong = {name: number for name, number in names.items() if name != "<|visual token 000012|>"}
    for changes, message in (
        ({"vocabulary_map": wrong}, "names of 19 codes, but the image tokenizer has 20"),
        ({"vocabulary_map": {k: v for k, v in names.items() if v != 6}}, "has no '<|extra_200|>'"),
        ({"tokenizer": {"double_latent": True}}, "vq_config: double_latent=True"),
        ({"text": {"hidden_act": "mish"}}, "text_config: hidden_act='mish'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            refused("Emu3ForConditionalGeneration", config(**changes))


def test_what_the_format_cannot_say():
    family = mmjax.convert.family.families()["Emu3ForConditionalGeneration"]
    ours = family.from_hf(mmjax.convert.Source(config(), frozenset(), None))
    say = mmjax.convert.save.say
    tokenizer = dataclasses.replace(ours.image.tokenizer, image_size=48)
    image = dataclasses.replace(ours.image, tokenizer=tokenizer)
    said = say(family, dataclasses.replace(ours, image=image, follow="grammar"), frozenset())
    assert said.to_dict()["vq_config"]["image_size"] == 48
    for wrong, message in (
        (dataclasses.replace(ours, modality_embeddings=True), "modality_embeddings=True"),
        (
            dataclasses.replace(ours, image=dataclasses.replace(image, row=None)),
            "image.row=None, but",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            say(family, wrong, frozenset())


def test_the_published_shapes():
    """Every tensor of the default config, whose image tokenizer has 32768 codes."""
    import torch

    from mmjax.convert.load import structure
    from mmjax.convert.table import lay_out, rename

    names = vocabulary(range(32768), first=151_854)
    hf_config = transformers.Emu3Config(vocabulary_map=names)
    with torch.device("meta"):
        reference = transformers.Emu3ForConditionalGeneration(hf_config)
    family = mmjax.convert.family.families()["Emu3ForConditionalGeneration"]
    source = mmjax.convert.Source(hf_config, frozenset(), None)
    ours = family.from_hf(source)
    assert (ours.image.ids, ours.image.length, ours.vocab_size) == (151_854, 90 * 91, 184_622)
    _, shapes = structure(Unified, ours)
    found = {entry.name: entry.shape for entry in lay_out(family.rows(ours), shapes)}
    state = reference.state_dict()
    canonical = rename(state, family.renames, "")
    assert found == {name: tuple(state[there].shape) for name, there in canonical.items()}
    assert family.from_hf(source._replace(config=family.to_hf(ours))) == ours
