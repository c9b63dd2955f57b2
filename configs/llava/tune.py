"""Tune LLaVA-1.5, or a model of its kind, on your own conversations about images.

python -m experiments.train --workdir runs/mine \
    --config configs/llava/tune.py:weights=DIR,data=train.json,val=val.json
python -m experiments.convert --source runs/mine --target MINE

DIR is a directory of Hugging Face format whose images become one picture each
(`LlavaForConditionalGeneration`); MINE will be another. The files are LLaVA's: a list of
{"image": FILE, "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A cat."}, ...]}, with images beside them.

Without `weights` the model is LLaVA-1.5-7B at random, for `experiments.plan`.
"""

from typing import Any

from ml_collections import ConfigDict

from mmjax import convert
from mmjax.config import ConfigError, parse_arg
from mmjax.models import VLMConfig
from mmjax.models.sizes import vit_size
from mmjax.registry import nearest
from mmjax.train.experiment import base_config
from mmjax.train.handover import model_dataclass

LLAVA_7B = dict(
    name="vlm",
    encoder=dict(
        image_size=336,
        **vit_size("L/14"),
        activation="quick_gelu",
        norm_eps=1e-5,
        pooling="cls",
        position="learned",
        pre_norm=True,
        patch_bias=False,
    ),
    connector=dict(name="mlp"),
    lm=dict(
        vocab_size=32_064,
        max_len=4096,
        width=4096,
        depth=32,
        heads=32,
        mlp_width=11_008,
        activation="silu",
        norm_eps=1e-5,
        tied=False,
        rope=dict(theta=1e4),
    ),
    image_token=32_000,
)
ADAPTERS = dict(rank=128, alpha=256, targets="lm/.*/(query|key|value|out|gate|up|down)")
# What is trained: {name: (rows of rules.trainable, adapters)}; rates are LLaVA-1.5's.
TRAINED: dict[str, tuple[tuple[tuple[str, bool], ...], dict[str, Any] | None, float]] = {
    "connector": ((("connector/.*", True), (".*", False)), None, 1e-3),
    "lm": ((("encoder/.*", False), (".*", True)), None, 2e-5),
    "lora": ((("connector/.*", True), (".*/lora/.*", True), (".*", False)), ADAPTERS, 2e-4),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module.

    Args:
      arg: weights, the directory; data and val, files of conversations ("" for no evaluation);
        train, "lm" (the connector too, LLaVA's second stage), "connector" (its first) or "lora";
        template, of conversations, and preset, of images: those of the model's kind; steps, batch,
        length (tokens of a row), lr (0: by what is trained), dtype.
    """
    arg = parse_arg(
        arg,
        weights="",
        data="train.json",
        val="",
        train="lm",
        template="vicuna_v1",
        preset="clip",
        steps=1000,
        batch=128,
        length=2048,
        lr=0.0,
        dtype="bfloat16",
    )
    if arg.train not in TRAINED:
        raise ConfigError(f"train={arg.train}; {nearest(arg.train, TRAINED)}")
    trainable, adapters, rate = TRAINED[arg.train]
    model = convert.model_config(arg.weights) if arg.weights else LLAVA_7B
    made: VLMConfig = model_dataclass(model)
    model |= dict(
        encoder=model["encoder"] | dict(dtype=arg.dtype, remat="full"),
        lm=model["lm"] | dict(dtype=arg.dtype, remat="full"),
    )

    def data(path: str) -> dict:
        return dict(
            sources=[dict(name="json", path=path, form="llava")],
            conversation=dict(
                template=arg.template,
                max_len=arg.length,
                images=1,
                image_token=made.image_token,
                too_long="skip",
                layout=dict(
                    name="whole",
                    preset=arg.preset,
                    size=made.encoder.image_size,
                    tokens=made.image_tokens,
                ),
            ),
        )

    evals = {}
    if arg.val:
        evals["val"] = dict(name="loss", every=max(arg.steps // 5, 1), data=data(arg.val))
    return base_config(
        task=dict(name="vlm"),
        model=model,
        init=((".*", arg.weights, r"\g<0>"),) if arg.weights else (),
        lora=adapters,
        data=dict(
            tokenizer=dict(name="hf", directory=arg.weights),
            train=data(arg.data),
            max_bad_share=0.01,
        ),
        optimizer=dict(
            name="adamw",
            learning_rate=arg.lr or rate,
            schedule=dict(name="cosine", warmup=max(arg.steps * 3 // 100, 1)),
            clip_norm=1.0,
        ),
        rules=dict(trainable=trainable),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=10),
        checkpoint=dict(every=max(arg.steps // 5, 1)),
        evals=evals,
    )
