"""A LLaVA directory of Hugging Face format with random weights: for tests and notebooks.

What it answers means nothing; all files are those of a real one.
"""

from __future__ import annotations

import json
from pathlib import Path

_SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
IMAGE = "<image>"
# It knows no other words.
_TEXTS = [
    "a photo of the red green blue yellow black white circle square triangle cat dog bird fish",
    "user : question : what is in this image ? where are they ? how many ? which colour has it ?",
    "assistant : answer : it is on the left , right , above or below , all of them are",
    "yes no maybe ! there are one two three four . describe compare both pictures in detail please",
]
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'ASSISTANT: ' if message['role'] == 'assistant' else 'USER: ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
    "{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


def write_random_vlm(
    directory: str | Path,
    *,
    image_size: int = 24,
    patch_size: int = 8,
    width: int = 32,
    depth: int = 2,
    max_len: int = 512,
    seed: int = 0,
) -> Path:
    """Writes config.json, weights, the processor's files, and a tokenizer of some words with a chat
    template.

    Raises:
      FileExistsError: if the directory has something in it.
    """
    import jax.numpy as jnp
    import numpy as np
    import tokenizers
    from flax import nnx

    import mmjax
    from mmjax.connectors import MLPConfig
    from mmjax.data.image import PRESETS
    from mmjax.data.tokenizer import train_tokenizer
    from mmjax.models import VLM, LMConfig, ViTConfig, VLMConfig
    from mmjax.nn.rope import Rope
    from mmjax.params import abstract, merge

    directory = Path(directory)
    tokenizer = train_tokenizer("wordlevel", _TEXTS, vocab_size=200)
    backend, begin = tokenizer.backend, _SPECIAL["bos_token"]
    backend.add_special_tokens([IMAGE])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_id)]
    )
    blocks = dict(width=width, depth=depth, heads=width // 16, mlp_width=2 * width, norm_eps=1e-5)
    config = VLMConfig(
        encoder=ViTConfig(
            image_size=image_size,
            patch_size=patch_size,
            activation="quick_gelu",
            pooling="cls",
            position="learned",
            pre_norm=True,
            patch_bias=False,
            **blocks,
        ),
        connector=MLPConfig(),
        lm=LMConfig(
            vocab_size=backend.get_vocab_size(),
            max_len=max_len,
            activation="silu",
            tied=False,
            rope=Rope(theta=1e4),
            **blocks,
        ),
        image_token=backend.token_to_id(IMAGE),
    )
    graph, shapes = abstract(lambda: VLM(config, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(seed).standard_normal
    # Norms near the identity, and all else so large that answers go on changing.
    weights = {path: 0.3 * draw(s.shape) + path.endswith("scale") for path, s in shapes.items()}
    model = merge(graph, {path: jnp.float32(value) for path, value in weights.items()})
    mmjax.save_pretrained(model, directory, architecture="LlavaForConditionalGeneration")
    tokenizer.save(directory)
    preset = PRESETS["clip"]
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_len,
            "chat_template": _TEMPLATE,
            **_SPECIAL,
        },
        "generation_config.json": {"eos_token_id": tokenizer.eos_id},
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "patch_size": patch_size,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_processor": {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": image_size},
                "crop_size": {"height": image_size, "width": image_size},
                "image_mean": preset.mean,
                "image_std": preset.std,
            },
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory
