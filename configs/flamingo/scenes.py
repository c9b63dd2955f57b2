"""Flamingo on composed scenes: SmolLM2-135M-Instruct stays as it is, gated blocks learn to look.

python -m experiments.train --config configs/siglip/tiles.py --workdir runs/tiles
python -m experiments.train --config configs/llava/scenes.py:stage=align --workdir runs/align
python -m experiments.train --config configs/flamingo/scenes.py --workdir runs/flamingo

The nine cells of a scene are the frames of one image: of each there is a visual token, a mixture of
words as alignment left it, and a vector that says where it stands. A document of training is nine
scenes, each with a question and its answer or with a caption, and a text sees the scene before it;
so the model is scored with no, four and eight examples (Alayrac et al., 2022), whose scenes are of
training.
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
        arg, start="runs/align", lm="", steps=900, batch=1, length=256, lr=1e-3, eval=200
    )
    lm = arg.lm or SMOLLM2
    base = scenes.get_config(f"lm={lm}").model.to_dict()
    model = base | dict(
        name="flamingo",
        connector=dict(name="frames", count=len(CELLS), each=base["connector"], norm="layernorm"),
        # SmolLM2's stream is of size 10 where gated blocks stand, a visual token of size 1.
        gated=dict(
            heads=base["lm"]["heads"], head_dim=64, mlp_width=base["lm"]["width"], copies=10.0
        ),
        every=5,
        after=4,
    )
    targets = 2 * arg.length // 3

    def source(split: str, **form) -> dict:
        return dict(name="tfds", dataset="scenes/small", split=split, form=form)

    def data(*sources: dict) -> dict:
        conversation = dict(
            template="interleaved",
            max_len=arg.length,
            # A question and its answer are some sixteen tokens.
            images=len(CELLS) * (arg.length // 16),
            layout=dict(name="board", preset="siglip", size=48, tokens=1, rows=3, columns=3),
            image_token=scenes.IMAGE_TOKEN,
        )
        return dict(sources=list(sources), conversation=conversation)

    questions = source("train", name="questions")
    captions = source("train", name="caption", text_field="captions")
    train = data(questions | dict(weight=4.0), captions | dict(weight=1.0))
    train["conversation"] |= dict(pack=True, document=1 + SHOTS[-1], max_targets=targets)
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
                data=data(source(split, name="questions")),
                limit=arg.eval,
                max_new_tokens=8,
                batch_size=8,
                controls=("blind",),
                shots=shots,
                shots_from=data(questions),
                shots_pool=1000,
                answers=f"{name}.jsonl",
                sheet=f"{name}.png",
                title=f"{title}, {shots} examples",
                note=ICONS_NOTE,
            )
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
            # Alignment is done.
            trainable=(("(encoder|lm|connector/each)/.*", False), (".*", True)),
            # Gates open from zero, as far as the rate takes them.
            learning_rate=(("gated/.*_gate", 10.0), (".*", 1.0)),
        ),
        train=dict(steps=arg.steps, batch_size=arg.batch, log_every=20),
        checkpoint=dict(every=arg.steps),
        evals=asked,
    )
