"""Flamingo on composed scenes: SmolLM2-135M-Instruct stays as it is, gated blocks learn to look.

python -m experiments.train --config configs/siglip/tiles.py --workdir runs/tiles
python -m experiments.train --config configs/llava/scenes.py:stage=align --workdir runs/align
python -m experiments.train --config configs/flamingo/scenes.py --workdir runs/flamingo

The nine cells of a scene are the frames of one image: of each there is a visual token, a mixture of
words as alignment left it, and a vector that says where it stands. It is scored with no, four and
eight examples (Alayrac et al., 2022) whose scenes are of training.
"""

from ml_collections import ConfigDict

from configs.llava import scenes
from configs.weights import SMOLLM2
from mmjax.config import parse_arg
from mmjax.data.scenes import CELLS
from mmjax.evaluate.sheets import ICONS_NOTE
from mmjax.train.experiment import base_config

SHOTS = (0, 4, 8)


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module.

    Args:
      arg: start, the run whose alignment is taken; lm; steps, batch (rows), length (tokens of a
        row), lr; eval (questions of each set).
    """
    arg = parse_arg(
        arg, start="runs/align", lm="", steps=600, batch=1, length=512, lr=1e-3, eval=200
    )
    lm = arg.lm or SMOLLM2
    base = scenes.get_config(f"lm={lm}").model.to_dict()
    model = base | dict(
        name="flamingo",
        connector=dict(name="frames", count=len(CELLS), each=base["connector"]),
        gated=dict(heads=base["lm"]["heads"], head_dim=64),
        every=3,
        after=0,
    )
    targets = arg.length // 3

    def data(split: str, **form) -> dict:
        source = dict(
            name="tfds",
            dataset="scenes/small",
            split=split,
            form=dict(name="questions") | form,
        )
        conversation = dict(
            template="interleaved",
            max_len=arg.length,
            images=len(CELLS) * (arg.length // 128),
            layout=dict(name="board", preset="siglip", size=48, tokens=1, rows=3, columns=3),
            parents=True,
            image_token=scenes.IMAGE_TOKEN,
        )
        return dict(sources=[source], conversation=conversation)

    train = data("train", turns=14, apart=True, caption=0.5, caption_field="captions")
    train["conversation"] |= dict(pack=True, max_targets=targets)
    asked = {}
    for key, split, title in (
        ("scenes", "test", "Scenes of concepts seen in training"),
        ("heldout", "heldout", "Scenes of held-out concepts"),
    ):
        for shots in SHOTS:
            name = f"{key}_{shots}"
            asked[name] = dict(
                name="vqa",
                every=arg.steps,
                data=data(split),
                limit=arg.eval,
                max_new_tokens=8,
                batch_size=8,
                controls=("blind",),
                shots=shots,
                shots_from=data("train"),
                shots_pool=1000,
                answers=f"{name}.jsonl",
                sheet=f"{name}.png",
                title=f"{title}, {shots} examples",
                note=ICONS_NOTE,
            )
    tables = "connector/each/projection/(head|token)/.*"
    return base_config(
        task=dict(name="vlm", targets=targets),
        model=model,
        init=(
            ("connector/each/(.*)", arg.start, r"connector/\1"),
            ("(encoder|lm)/.*", arg.start, r"\g<0>"),
        ),
        data=dict(
            tokenizer=dict(name="gguf", path=lm),
            train=train,
            workers=0,
            threads=1,
            prefetch=4,
            max_bad_share=0.01,
        ),
        optimizer=dict(
            name="adamw",
            options=dict(b2=0.95),
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=arg.steps // 20),
            weight_decay=0.01,
            clip_norm=1.0,
        ),
        rules=dict(
            trainable=((f"(encoder|lm)/.*|{tables}", False), (".*", True)),
            # Alignment is done.
            learning_rate=(("connector/each/.*", 0.1), (".*", 1.0)),
        ),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=20),
        checkpoint=dict(every=arg.steps),
        evals=asked,
    )
