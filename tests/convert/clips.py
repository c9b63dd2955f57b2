"""What the tests of CLIP and of MetaCLIP 2 share: configs, and each class beside ours."""

from __future__ import annotations

import hf
import jax
import numpy as np
from towers import SMALL, TOKENS, blocks, channels_first, check, long, pixels, remember, texts

transformers = hf.transformers()

VISION = {**SMALL, "image_size": 24, "patch_size": 8, "intermediate_size": 48}
TEXT = {**SMALL, **TOKENS, "intermediate_size": 48, "eos_token_id": 40}
# Towers of different depths, widths and heads, both GELUs, both pooling positions.
CONFIGS = {
    "as published": {"vision_config": VISION, "text_config": TEXT, "projection_dim": 24},
    "largest id": {
        "vision_config": {**VISION, "hidden_act": "gelu", "image_size": 16, "patch_size": 4},
        "text_config": {**TEXT, "hidden_act": "gelu", "eos_token_id": 2},
        "projection_dim": 32,
    },
    "unlike towers": {
        "vision_config": {
            **VISION,
            **{"num_hidden_layers": 3, "hidden_size": 36, "num_attention_heads": 3},
            **{"num_channels": 1, "layer_norm_eps": 1e-3, "intermediate_size": 20},
        },
        "text_config": {
            **TEXT,
            **{"num_hidden_layers": 1, "hidden_size": 20, "num_attention_heads": 2},
            **{"vocab_size": 61, "layer_norm_eps": 1e-2, "hidden_act": "gelu_pytorch_tanh"},
        },
        "projection_dim": 17,
        "logit_scale_init_value": 3.5,
    },
    "partial patches": {
        "vision_config": {**VISION, "image_size": 29, "patch_size": 7, "hidden_act": "relu"},
        "text_config": {**TEXT, "max_position_embeddings": 15, "hidden_act": "silu"},
        "projection_dim": 8,
        "logit_scale_init_value": 4.7,  # above the ln 100 of OpenAI's training
    },
}
ENDS = (3, 7, 11, 5)


def _class(prefix: str, name: str):
    return getattr(transformers, prefix + name)


def _batch(vision, text=None):
    size = vision.image_size
    images = pixels(3, size, size, vision.num_channels)
    tokens, mask = texts(*ENDS)
    # Ids above the end-of-text token, where the two ways of pooling differ.
    tokens = tokens.at[:2, 1].set(45)
    return images, tokens, mask


def check_pair(prefix: str, options: dict, directory, gradients: bool = True) -> None:
    config = _class(prefix, "Config")(**options)
    inputs = _batch(config.vision_config)
    mask = np.asarray(inputs[2])

    def ours(model, images, tokens, mask):
        image = model.image(images, features=range(config.vision_config.num_hidden_layers))
        text = model.text(tokens, mask, features=range(config.text_config.num_hidden_layers))
        remember(model, "image", image)
        remember(model, "text", text)
        return {
            "logits": model(images, tokens, mask),
            "image embeddings": model.encode_image(images),
            "text embeddings": model.encode_text(tokens, mask),
            "image blocks": image.features,
            "text blocks": text.features,
            "text tokens": text.tokens,
        }

    def theirs(reference, images, tokens, mask):
        out = reference(long(tokens), channels_first(images), long(mask), output_hidden_states=True)
        image, text = out.vision_model_output, out.text_model_output
        return {
            "logits": out.logits_per_image,
            "image embeddings": out.image_embeds,
            "text embeddings": out.text_embeds,
            "image blocks": blocks(image.hidden_states),
            "text blocks": blocks(text.hidden_states),
            "text tokens": text.last_hidden_state,
        }

    depth = config.text_config.num_hidden_layers
    where = {"text tokens": mask, "text blocks": np.broadcast_to(mask, (depth, *mask.shape))}
    reference = _class(prefix, "Model")(config)
    check(f"{prefix}Model", reference, directory, inputs, ours, theirs, where, gradients)


def check_vision(prefix: str, projected: bool, directory) -> None:
    config = _class(prefix, "VisionConfig")(**VISION, projection_dim=20, hidden_act="gelu")
    name = "VisionModelWithProjection" if projected else "VisionModel"

    def ours(model, images):
        out = model(images, features=(-1,))
        return {"pooled": out.pooled, "last block": out.features[0]}

    def theirs(reference, images):
        out = reference(channels_first(images))
        pooled = out.image_embeds if projected else out.pooler_output
        # In CLIP what is called the last hidden state has not been normalised.
        return {"pooled": pooled, "last block": out.last_hidden_state}

    inputs = (_batch(config)[0],)
    check(
        prefix + name,
        _class(prefix, name)(config),
        directory,
        inputs,
        ours,
        theirs,
        gradients=False,
    )


def check_text(prefix: str, projected: bool, directory) -> None:
    config = _class(prefix, "TextConfig")(**TEXT, projection_dim=20, hidden_act="gelu")
    name = "TextModelWithProjection" if projected else "TextModel"

    def ours(model, tokens):
        out = model(tokens)
        return {"pooled": out.pooled, "tokens": out.tokens}

    def theirs(reference, tokens):
        out = reference(long(tokens))
        pooled = out.text_embeds if projected else out.pooler_output
        return {"pooled": pooled, "tokens": out.last_hidden_state}

    inputs: tuple[jax.Array, ...] = (texts(*ENDS)[0],)
    check(
        prefix + name,
        _class(prefix, name)(config),
        directory,
        inputs,
        ours,
        theirs,
        gradients=False,
    )


def check_classifier(prefix: str, directory) -> None:
    config = _class(prefix, "Config")(**CONFIGS["as published"], num_labels=5)
    name = f"{prefix}ForImageClassification"

    def ours(model, images):
        return {"logits": model(images).logits}

    def theirs(reference, images):
        return {"logits": reference(channels_first(images)).logits}

    inputs = (_batch(config.vision_config)[0],)
    reference = getattr(transformers, name)(config)
    check(name, reference, directory, inputs, ours, theirs, gradients=False)
