"""SigLIP on single cells of composed scenes: the image encoder of configs/llava/scenes.py.

python -m experiments.train --config configs/siglip/tiles.py --workdir runs/tiles

It sees every concept, those included that the scenes hold out from the language model: as CLIP has
seen what an instruction-tuned model is later asked about. The text tower reads the token vectors of
the language model that the encoder is meant for, as they are (locked, as in LiT; Zhai et al.,
2022): what the encoder learns of names is then not far from what that model reads.
"""

from ml_collections import ConfigDict

from configs import weights
from configs.openmoji import two_towers
from mmjax import convert
from mmjax.config import parse_arg
from mmjax.evaluate.sheets import ICONS_NOTE


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module.

    Args:
      arg: steps, batch, lr; lm, a directory or GGUF file, SmolLM2-135M-Instruct if not given.
    """
    arg = parse_arg(arg, steps=1200, batch=128, lr=3e-3, lm="")
    lm = arg.lm or weights.smollm2()
    table = convert.open_checkpoint(lm).config
    config = two_towers("siglip", f"steps={arg.steps},batch={arg.batch},lr={arg.lr}")
    train = config.data.train.to_dict()
    text = dict(max_len=16)

    def data(split: str, augment: tuple = ()) -> dict:
        source = dict(name="tfds", dataset="scene_tiles", split=split)
        return dict(sources=[source], image=train["image"] | dict(augment=augment), text=text)

    with config.ignore_type():
        config.model.text = config.model.text.to_dict() | dict(
            vocab_size=table.vocab_size,
            max_len=text["max_len"],
            width=table.width,
            depth=1,
            heads=table.heads,
            mlp_width=2 * table.width,
        )
        config.init = (("text/token/embedding", lm, "token/embedding"),)
        config.rules.trainable = (("text/token/embedding", False), (".*", True))
        config.data.tokenizer = dict(name="gguf", path=lm)
        crop = dict(name="random_resized_crop", scale=(0.75, 1.0), ratio=(0.9, 1.1))
        config.data.train = data("seen+heldout", (crop,))
        # Half of the time a name or a colour and a shape alone.
        config.data.train.text = text | dict(also="aliases", also_share=0.5)
        config.evals = dict(
            names=dict(
                name="retrieval",
                every=max(arg.steps // 4, 1),
                queries=data("test"),
                title="Cells of scenes: one of each concept and word",
                note=ICONS_NOTE,
            )
        )
    return config
