"""A small language model that answers questions about composed scenes from their descriptions.

python -m experiments.train --config configs/lm/scenes.py --workdir runs/reader

It stands for a pretrained one where SmolLM2 is too large (configs/connectors/scenes.py): it knows
the words and what is asked, and has never been shown an image.
"""

from ml_collections import ConfigDict

from mmjax.config import parse_arg
from mmjax.data.scenes import SIZES
from mmjax.evaluate.sheets import ICONS_NOTE
from mmjax.train.experiment import base_config

MODEL = dict(
    name="lm",
    vocab_size=320,
    max_len=512,
    width=128,
    depth=4,
    heads=4,
    mlp_width=384,
    activation="silu",
    norm_eps=1e-5,
    tied=True,
    rope=dict(theta=10_000.0),
)


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module.

    Args:
      arg: steps, batch (rows), length (tokens of a row), lr; concepts (see `mmjax.data.scenes`);
        eval (questions of new scenes).
    """
    arg = parse_arg(arg, steps=1000, batch=12, length=320, lr=1e-3, concepts="tiny", eval=300)
    targets = arg.length // 3

    def data(split: str, **form) -> dict:
        source = dict(
            name="tfds",
            dataset=f"scenes/{arg.concepts}",
            split=split,
            form=dict(name="described") | form,
        )
        return dict(sources=[source], conversation=dict(template="qa", max_len=arg.length))

    train = data("train", turns=14)
    train["conversation"] |= dict(pack=True, max_targets=targets)
    return base_config(
        task=dict(name="lm", targets=targets),
        model=MODEL,
        data=dict(
            tokenizer=dict(
                name="wordlevel", vocab_size=MODEL["vocab_size"], captions=SIZES["train"]
            ),
            train=train,
            workers=0,
            threads=1,
            prefetch=4,
        ),
        optimizer=dict(
            name="adamw",
            options=dict(b2=0.95),
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=arg.steps // 20),
            weight_decay=0.05,
            clip_norm=1.0,
        ),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=50),
        checkpoint=dict(every=arg.steps),
        evals=dict(
            validation=dict(
                name="vqa",
                every=max(arg.steps // 3, 1),
                data=data("validation"),
                limit=arg.eval,
                max_new_tokens=8,
                controls=(),
                answers="validation.jsonl",
                title="New scenes, described in words",
                note=ICONS_NOTE,
            )
        ),
    )
