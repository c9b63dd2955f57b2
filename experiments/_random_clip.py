"""A CLIP directory of Hugging Face format with random weights: for benchmarks, tests, notebooks.

What it answers means nothing; all files are those of a real one.
"""

from __future__ import annotations

import json
from pathlib import Path

_SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
_TEXTS = ["a photo of the red green blue yellow circle square triangle cat dog"]


def write_random_clip(
    directory: str | Path,
    *,
    image_size: int = 48,
    patch_size: int = 12,
    width: int = 64,
    depth: int = 2,
    max_len: int = 77,
    seed: int = 0,
) -> Path:
    """Writes config.json, weights, preprocessor_config.json and a byte-level tokenizer.

    Raises:
      FileExistsError: if the directory has something in it.
    """
    from flax import nnx

    import mmjax
    from mmjax.data.image import PRESETS
    from mmjax.data.tokenizer import train_tokenizer
    from mmjax.models import CLIP, CLIPConfig, TextConfig, ViTConfig

    directory = Path(directory)
    tokenizer = train_tokenizer("bpe", _TEXTS, vocab_size=400)
    tower = dict(
        width=width,
        depth=depth,
        heads=width // 32,
        mlp_width=4 * width,
        activation="quick_gelu",
        norm_eps=1e-5,
    )
    config = CLIPConfig(
        image=ViTConfig(
            image_size=image_size,
            patch_size=patch_size,
            pooling="cls",
            position="learned",
            pre_norm=True,
            patch_bias=False,
            **tower,
        ),
        text=TextConfig(
            vocab_size=tokenizer.vocab_size,
            max_len=max_len,
            attention="causal",
            pooling="eos",
            padding="attend",
            eos_id=tokenizer.eos_id,
            **tower,
        ),
        embed_dim=width,
    )
    mmjax.save_pretrained(CLIP(config, rngs=nnx.Rngs(seed)), directory)
    tokenizer.save(directory)
    described = json.loads((directory / "config.json").read_text("utf-8"))
    described["text_config"]["bos_token_id"] = tokenizer.bos_id
    preset = PRESETS["clip"]
    files = {
        "config.json": described,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_len,
            **_SPECIAL,
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": image_size},
            "crop_size": {"height": image_size, "width": image_size},
            "image_mean": preset.mean,
            "image_std": preset.std,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory
