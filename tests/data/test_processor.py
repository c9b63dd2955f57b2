"""Whole processor directories against transformers: files, text, chat, and what does not fit."""

import json

import numpy as np
import pytest
from PIL import Image
from samples import picture
from test_tokenizer import clip_directory

from mmjax.data.load_processor import load_processor
from mmjax.data.processor import check_vocabulary
from mmjax.patches import Patches
from mmjax.registry import UnknownNameError

transformers = pytest.importorskip("transformers")

TEXTS = ["Red DOG", "a cat", "a red dog; a Red cat!", ""]
IMAGES = [picture(1, (61, 40)), picture(2, (40, 61)).convert("L"), picture(3).quantize(9)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def words(*special):
    """A word-level backend of the tokenizers library, whose first ids are the special tokens."""
    import tokenizers

    vocabulary = [*special, "a", "b", "c", "red", "dog", "cat", "the", ";", "!"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary.index("</s>"))]
    )
    return backend


def word_tokenizer(**options):
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words("<pad>", "<unk>", "</s>"),
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        **options,
    )


def siglip_tokenizer(path):
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("dog", "cat")]
    path.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus * 9),
        model_prefix=str(path / "spiece"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return transformers.SiglipTokenizer(str(path / "spiece.model"), model_input_names=["input_ids"])


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """family -> a directory as transformers writes it, without weights."""
    root = tmp_path_factory.mktemp("models")
    small = {"height": 24, "width": 24}
    clip_directory(root / "clip_tokenizer")
    clip_tokens = transformers.AutoTokenizer.from_pretrained(root / "clip_tokenizer")
    clip_images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=24)
    towers = {
        "clip": transformers.CLIPProcessor(clip_images, clip_tokens),
        "siglip2": transformers.Siglip2Processor(
            # Transformers' own Siglip2Processor would ignore other numbers.
            transformers.Siglip2ImageProcessorPil(patch_size=16, max_num_patches=256),
            word_tokenizer(padding_side="right", model_input_names=["input_ids"]),
        ),
        "altclip": transformers.AltCLIPProcessor(clip_images, word_tokenizer(model_max_length=20)),
        "metaclip_2": transformers.CLIPProcessor(clip_images, word_tokenizer()),
    }
    text = {"vocab_size": 60}
    configs = {
        "clip": transformers.CLIPConfig(text_config=text),
        "siglip": transformers.SiglipConfig(text_config=text),
        "siglip2": transformers.Siglip2Config(text_config=text),
        "altclip": transformers.AltCLIPConfig(text_config=text),
        "metaclip_2": transformers.MetaClip2Config(text_config=text),
        "vit": transformers.ViTConfig(),
        "dinov2": transformers.Dinov2Config(),
        "bert": transformers.BertConfig(vocab_size=60),
        "llama": transformers.LlamaConfig(vocab_size=60, architectures=["LlamaForCausalLM"]),
    }
    for name, config in configs.items():
        config.save_pretrained(root / name)
    for name, tower in towers.items():
        tower.save_pretrained(root / name)
    transformers.ViTImageProcessorPil(size=small, do_convert_rgb=True).save_pretrained(root / "vit")
    transformers.BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=28).save_pretrained(
        root / "dinov2"
    )
    word_tokenizer(model_max_length=12).save_pretrained(root / "bert")
    word_tokenizer(chat_template=TEMPLATE).save_pretrained(root / "llama")
    return root


@pytest.fixture(scope="module")
def directory(request, directories):
    """The directory of the family that the test is parametrized with."""
    if request.param == "siglip" and not (directories / "spiece").exists():
        images = transformers.SiglipImageProcessorPil(size={"height": 24, "width": 24})
        tokenizer = siglip_tokenizer(directories / "spiece")
        transformers.SiglipProcessor(images, tokenizer).save_pretrained(directories / "siglip")
    return directories / request.param


def hf_images(directory, images):
    processor = transformers.AutoImageProcessor.from_pretrained(directory, backend="pil")
    return processor(images, return_tensors="np")


IMAGE_FAMILIES = ["vit", "dinov2", "clip", "siglip", "altclip", "metaclip_2"]


@pytest.mark.parametrize("directory", IMAGE_FAMILIES, indirect=True)
def test_images_by_directory(directory):
    got = load_processor(directory)(images=IMAGES)
    wanted = hf_images(directory, IMAGES)["pixel_values"]
    assert list(got) == ["images"] and got["images"].dtype == np.float32
    np.testing.assert_array_equal(got["images"], np.asarray(wanted).transpose(0, 2, 3, 1))


def test_patches_by_directory(directories):
    images = [image.convert("RGB") for image in IMAGES]
    got = load_processor(directories / "siglip2")(images=images)["images"]
    wanted = hf_images(directories / "siglip2", images)
    assert isinstance(got, Patches)
    assert [part.dtype for part in got] == [np.float32, np.int32, bool]
    np.testing.assert_array_equal(got.patches, wanted["pixel_values"])
    np.testing.assert_array_equal(got.shapes, wanted["spatial_shapes"])
    np.testing.assert_array_equal(got.mask, wanted["pixel_attention_mask"])


# family -> how transformers has to be called for its model.
TEXT_CALLS = {
    "clip": dict(padding="max_length", max_length=77),
    "metaclip_2": dict(padding="max_length", max_length=77),
    "siglip": dict(padding="max_length", max_length=64),
    "siglip2": dict(padding="max_length", max_length=64),
    "altclip": dict(padding=True),
    "bert": dict(padding=True),
    "llama": dict(padding=True, padding_side="left"),
}


@pytest.mark.parametrize("directory", TEXT_CALLS, indirect=True)
def test_text_by_directory(directory):
    family = directory.name
    got = load_processor(directory)(text=TEXTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    # The fixed-resolution SigLIP 2 checkpoints have a tokenizer that does not lower-case.
    texts = [text.lower() for text in TEXTS] if family.startswith("siglip") else TEXTS
    wanted = tokenizer(texts, return_tensors="np", **TEXT_CALLS[family])
    assert got["tokens"].dtype == np.int32 and got["mask"].dtype == bool
    np.testing.assert_array_equal(got["tokens"], wanted["input_ids"])
    if "attention_mask" in wanted:
        np.testing.assert_array_equal(got["mask"], wanted["attention_mask"].astype(bool))
    else:
        assert got["mask"].all() and family.startswith("siglip")


def test_images_and_text_are_one_call_of_the_model(directories):
    processor = load_processor(str(directories / "clip"))
    batch = processor(images=IMAGES, text="a red dog", do_normalize=False)
    assert {key: value.shape for key, value in batch.items()} == {
        "images": (3, 24, 24, 3),
        "tokens": (1, 77),
        "mask": (1, 77),
    }
    assert batch["images"].min() >= 0 and batch["images"].max() <= 1
    assert processor.decode(batch["tokens"][0]) == "a red dog"
    assert processor.batch_decode(batch["tokens"]) == ["a red dog"]


def test_lengths_and_sides(directories):
    bert = load_processor(directories / "bert")
    long = "a b c " * 5
    with pytest.raises(ValueError, match="16 tokens where the model takes 12: 'a b c"):
        bert(text=["a", long])
    assert bert(text=["a", long], truncation=True)["tokens"].shape == (2, 12)
    assert bert(text=["a"], padding="max_length")["tokens"].shape == (1, 12)
    assert bert(text=[long], max_length=20)["tokens"].shape == (1, 16)
    with pytest.raises(ValueError, match="2 to 3 tokens: a batch needs padding"):
        bert(text=["a", "a b"], padding=False)
    assert bert(text=["a", "a b"], padding_side="left")["tokens"][0, 0] == 0
    llama = load_processor(directories / "llama")
    assert llama(text=["a", long * 9])["mask"][:, -1].all()  # no limit, padding on the left
    assert llama(text=["a"], padding_side="right", padding="max_length", max_length=7)["mask"][0, 0]


def test_chat(directories):
    processor = load_processor(directories / "llama")
    talk = [{"role": "user", "content": "a red dog"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directories / "llama")
    wanted = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    got = processor.apply_chat_template([talk, talk * 2], add_generation_prompt=True)
    np.testing.assert_array_equal(got["tokens"][0, got["mask"][0]], wanted)
    assert not got["mask"][0, 0] and got["mask"][:, -1].all()
    text = processor.apply_chat_template(talk, tokenize=False)
    assert text == "user: a red dog</s>"
    with pytest.raises(ValueError, match="chat_template"):
        load_processor(directories / "bert").apply_chat_template(talk)


def test_old_directories(directories, tmp_path):
    """preprocessor_config.json, and one that names no class."""
    path = tmp_path / "old"
    path.mkdir()
    options = {"size": 30, "crop_size": 28, "resample": 3, "do_convert_rgb": True}
    (path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    for declared in ({}, {"feature_extractor_type": "CLIPFeatureExtractor"}):
        (path / "preprocessor_config.json").write_text(json.dumps(options | declared))
        wanted = hf_images(path, IMAGES)["pixel_values"]
        got = load_processor(path)(images=IMAGES)["images"]
        np.testing.assert_array_equal(got, np.asarray(wanted).transpose(0, 2, 3, 1))
    # What transformers 5 writes stands above what an older version left behind.
    (path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_processor_type": "ViTImageProcessor", "size": 8}})
    )
    assert load_processor(path)(images=IMAGES[0])["images"].shape == (1, 8, 8, 3)


def test_directories_that_cannot_be_used(directories, tmp_path):
    def says(pattern, directory=tmp_path, kind=ValueError):
        with pytest.raises(kind, match=pattern):
            load_processor(directory)

    says("did you mean 'clip'", directories / "clpi")
    says("is a file", directories / "clip" / "config.json")
    says("nothing to process images or text with")
    (tmp_path / "preprocessor_config.json").write_text('{"size": 8}')
    says("no image_processor_type, and none is known for model_type None")
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Blob"}')
    says("no image processor 'Blob'; Valid: BitImageProcessor", kind=UnknownNameError)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 8')
    says("preprocessor_config.json is not JSON")
    (tmp_path / "preprocessor_config.json").write_text("[]")
    says("holds no JSON object")
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    says("tokenizer in .* cannot be read")


def test_calls_that_cannot_be_used(directories):
    vit, bert = (load_processor(directories / name) for name in ("vit", "bert"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        vit(text="a dog")
    with pytest.raises(ValueError, match=r"no preprocessor_config\.json"):
        bert(images=IMAGES[0])
    with pytest.raises(ValueError, match="neither images nor text"):
        bert()
    with pytest.raises(ValueError, match="no texts"):
        bert(text=[])
    with pytest.raises(ValueError, match="must be a string"):
        bert(text=["a", 3])
    with pytest.raises(UnknownNameError, match="did you mean 'max_length'"):
        bert(text="a", max_len=3)
    with pytest.raises(UnknownNameError, match="did you mean 'do_convert_rgb'"):
        vit(images=Image.new("RGB", (9, 9)), convert_rgb=True)


def test_weights_and_tokenizer_that_disagree(directories, tmp_path):
    tokenizer = word_tokenizer()
    size = len(tokenizer)
    check_vocabulary(tokenizer, size)
    with pytest.raises(
        ValueError, match=rf"2 tokens .* up to {size - 1} .* vocabulary has {size - 2}"
    ):
        check_vocabulary(tokenizer, size - 2)
    tokenizer.save_pretrained(tmp_path)
    transformers.BertConfig(vocab_size=size - 2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not belong together"):
        load_processor(tmp_path)
    # A token that was added and that no text has is no harm, until a text has it.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    transformers.BertConfig(vocab_size=size).save_pretrained(tmp_path)
    processor = load_processor(tmp_path)
    processor(text="a dog")
    with pytest.raises(ValueError, match=rf"makes the token {size} \('<image>'\)"):
        processor(text="a dog <image>")
