"""Embeddings beside transformers; models and directories that cannot embed."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx
from search_pictures import picture

import mmjax
from mmjax.convert import ConversionError
from mmjax.data.tokenizer import train_tokenizer
from mmjax.models import SigLIP, SigLIPConfig, TextConfig, ViT, ViTConfig
from mmjax.search import Embedder, fingerprint

TEXTS = ["a red cat", "a photo of the blue square", "dog"]
PICTURES = [picture(seed, size) for seed, size in ((1, (40, 30)), (2, (48, 48)), (3, (20, 90)))]


def test_equals_transformers(weights, embedder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.CLIPModel.from_pretrained(weights).eval()
    images = transformers.AutoImageProcessor.from_pretrained(weights, backend="pil")(
        PICTURES, return_tensors="pt"
    )
    tokens = transformers.AutoTokenizer.from_pretrained(weights)(
        TEXTS, padding="max_length", max_length=16, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(tokens["input_ids"], images["pixel_values"], tokens["attention_mask"])
    np.testing.assert_allclose(embedder.images(PICTURES), out.image_embeds.numpy(), atol=2e-6)
    np.testing.assert_allclose(embedder.texts(TEXTS), out.text_embeds.numpy(), atol=2e-6)
    probabilities = embedder.probabilities(embedder.images(PICTURES), embedder.texts(TEXTS))
    expected = out.logits_per_image.softmax(-1).numpy()
    np.testing.assert_allclose(probabilities, expected, atol=2e-5)


def test_paths_bytes_and_company_make_no_difference(embedder, tmp_path):
    alone = np.concatenate([embedder.images([image]) for image in PICTURES])
    np.testing.assert_allclose(alone, embedder.images(PICTURES * 5)[:3], atol=1e-6)
    PICTURES[0].save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    for source in (path, str(path), path.read_bytes(), np.asarray(PICTURES[0])):
        np.testing.assert_array_equal(embedder.images([source])[0], alone[0])
    with pytest.raises(ValueError, match="nothing to embed"):
        embedder.images([])


def test_texts_are_cut_if_asked(embedder):
    long = "a red cat " * 20
    with pytest.raises(ValueError, match="where the model takes 16"):
        embedder.texts([long, "dog"])
    cut, short = embedder.texts([long, "dog"], truncation=True)
    np.testing.assert_array_equal(cut, embedder.texts([2 * long, "dog"], truncation=True)[0])
    np.testing.assert_allclose(short, embedder.texts(["dog"])[0], atol=1e-6)
    assert cut @ short < 0.999


def test_one_compilation_for_batches_and_one_for_single_items(weights):
    embedder = Embedder.load(weights, batch_size=16)
    for count in (1, 3, 16, 21):
        assert embedder.images(PICTURES[:1] * count).shape == (count, 32)
        assert embedder.texts(["cat", "a red dog", "a"][: min(count, 3)]).shape[1] == 32
    assert embedder._image._cache_size() == embedder._text._cache_size() == 2


def test_transparency_is_on_white(embedder, tmp_path):
    clear = PICTURES[0].copy()
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    white = np.full((30, 40, 3), 255, np.uint8)
    np.testing.assert_array_equal(
        embedder.images([tmp_path / "clear.png"]), embedder.images([white])
    )


def test_siglip_judges_each_text_alone():
    tokenizer = train_tokenizer("bpe", TEXTS, 300)

    def processor(images=None, text=None, truncation=False):
        if images is not None:
            resized = np.asarray(images.resize((16, 16)), np.float32)
            return {"images": resized[None] / 127.5 - 1}
        ids, mask, _ = tokenizer.encode(text, 8)
        return {"tokens": ids, "mask": mask}

    processor.max_length = 8
    tower = dict(width=32, depth=1, heads=2, mlp_width=32, activation="gelu_tanh", norm_eps=1e-6)
    model = SigLIP(
        SigLIPConfig(
            image=ViTConfig(
                image_size=16, patch_size=8, pooling="map", position="learned", **tower
            ),
            text=TextConfig(
                vocab_size=300,
                max_len=8,
                attention="bidirectional",
                pooling="last",
                padding="attend",
                **tower,
            ),
            init_bias=-3.0,
        ),
        rngs=nnx.Rngs(0),
    )
    embedder = Embedder(model, processor)
    images, texts = embedder.images(PICTURES), embedder.texts(["a cat", "a dog"])
    expected = 1 / (1 + np.exp(3.0 - 10 * images @ texts.T))
    np.testing.assert_allclose(embedder.probabilities(images, texts), expected, atol=1e-6)


def test_the_fingerprint_is_of_the_content(weights, tmp_path):
    moved = shutil.copytree(weights, tmp_path / "moved")
    assert fingerprint(moved) == fingerprint(weights)
    (moved / "README.md").write_text("says nothing about the model")
    assert fingerprint(moved) == fingerprint(weights)
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    assert fingerprint(moved) != fingerprint(weights)


def test_large_files_are_sampled_to_their_ends(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3_000_000))
    prints = [fingerprint(tmp_path)]
    for place in (0, 2_999_999):
        data = bytearray(3_000_000)
        data[place] = 1
        path.write_bytes(data)
        prints.append(fingerprint(tmp_path))
    assert len(set(prints)) == 3


def test_what_cannot_embed_is_refused_before_weights_are_read(weights, tmp_path):
    with pytest.raises(ConversionError, match="There is no"):
        Embedder.load(tmp_path / "gone")
    tower = dict(width=32, depth=1, heads=2, mlp_width=32, activation="gelu", norm_eps=1e-12)
    vit = ViT(
        ViTConfig(image_size=16, patch_size=8, pooling="cls", position="learned", **tower),
        rngs=nnx.Rngs(0),
    )
    mmjax.save_pretrained(vit, tmp_path / "vit")
    with pytest.raises(ConversionError, match="ViT, which does not put images and texts"):
        Embedder.load(tmp_path / "vit")
    bare = shutil.copytree(weights, tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(ConversionError, match=r"lacks its preprocessor_config\.json"):
        Embedder.load(bare)
    mute = shutil.copytree(weights, tmp_path / "mute")
    for file in mute.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConversionError, match="lacks its tokenizer"):
        Embedder.load(mute)
    other = shutil.copytree(weights, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["vocab_size"] = 100
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not belong together"):
        Embedder.load(other)
    with pytest.raises(ValueError, match="at least 1"):
        Embedder.load(weights, batch_size=0)


TOWER = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
)
# family -> (class, config, image processor); images 24 pixels in patches of 8, texts 8 tokens.
FAMILIES = {
    "siglip": (
        "Siglip",
        dict(
            text_config={**TOWER, "max_position_embeddings": 8, "projection_size": 32},
            vision_config={**TOWER, "image_size": 24, "patch_size": 8},
        ),
        ("SiglipImageProcessorPil", dict(size={"height": 24, "width": 24})),
    ),
    "siglip2": (
        "Siglip2",
        dict(
            text_config={**TOWER, "max_position_embeddings": 8, "projection_size": 32},
            vision_config={**TOWER, "num_patches": 16, "patch_size": 8},
        ),
        ("Siglip2ImageProcessorPil", dict(patch_size=8, max_num_patches=16)),
    ),
    "altclip": (
        "AltCLIP",
        dict(
            text_config={**TOWER, "max_position_embeddings": 40, "project_dim": 24},
            vision_config={**TOWER, "image_size": 24, "patch_size": 8},
            projection_dim=24,
        ),
        ("CLIPImageProcessorPil", dict(size={"shortest_edge": 24}, crop_size=24)),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_equal_transformers(family, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, options, (processor, settings) = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(tmp_path)
    image_processor = getattr(transformers, processor)(**settings)
    image_processor.save_pretrained(tmp_path)
    word_tokenizer(attends=family != "altclip").save_pretrained(tmp_path)
    # For SigLIP 2 it makes another kind of tokenizer of what was saved.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    embedder = Embedder.load(tmp_path, batch_size=8)
    images = image_processor([picture.convert("RGB") for picture in PICTURES], return_tensors="pt")
    texts = ["a red cat", "a dog"]
    padding = (
        dict(padding=True) if family == "altclip" else dict(padding="max_length", max_length=8)
    )
    tokens = tokenizer(texts, return_tensors="pt", **padding)
    with torch.no_grad():
        out = model(**tokens, **images)
    np.testing.assert_allclose(embedder.images(PICTURES), out.image_embeds.numpy(), atol=5e-6)
    np.testing.assert_allclose(embedder.texts(texts), out.text_embeds.numpy(), atol=5e-6)
    got = embedder.probabilities(embedder.images(PICTURES), embedder.texts(texts))
    logits = out.logits_per_image
    wanted = logits.softmax(-1) if family == "altclip" else logits.sigmoid()
    np.testing.assert_allclose(got, wanted.numpy(), atol=2e-5)


def word_tokenizer(attends: bool):
    """One id for a word; without a mask where its model attends to padding."""
    import tokenizers
    import transformers

    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "red", "cat", "dog"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = ["input_ids"] if attends else ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=names,
    )
