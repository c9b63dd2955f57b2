"""SigLIP on single cells of composed scenes: the image encoder of configs/llava/scenes.py.

python -m experiments.train --config configs/siglip/tiles.py --workdir runs/tiles

It sees every concept, those included that the scenes hold out from the language model: as CLIP has
seen what an instruction-tuned model is later asked about.
"""

from ml_collections import ConfigDict

from configs.openmoji import two_towers
from mmjax.evaluate.sheets import ICONS_NOTE


def get_config(arg: str | None = None) -> ConfigDict:
    config = two_towers("siglip", arg)
    train = config.data.train.to_dict()

    def data(split: str) -> dict:
        source = dict(name="tfds", dataset="scene_tiles", split=split)
        image = train["image"] | dict(augment=())
        return dict(sources=[source], image=image, text=dict(max_len=train["text"]["max_len"]))

    # Views were drawn when the data was prepared: there is nothing to augment.
    text = train["text"] | dict(also_share=0.5)
    config.data.train = ConfigDict(data("seen+heldout") | dict(text=text))
    config.evals = ConfigDict(
        dict(
            names=dict(
                name="retrieval",
                every=max(config.train.steps // 4, 1),
                queries=data("test"),
                title="Cells of scenes: one of each concept and word",
                note=ICONS_NOTE,
            )
        )
    )
    return config
