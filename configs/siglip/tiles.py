"""SigLIP on single cells of composed scenes: the image encoder of configs/llava/scenes.py.

python -m experiments.train --config configs/siglip/tiles.py --workdir runs/tiles

It sees every concept, those included that the scenes hold out from the questions: as CLIP has seen
what an instruction-tuned model is later asked about.
"""

from ml_collections import ConfigDict

from configs.openmoji import two_towers
from mmjax.config import parse_arg
from mmjax.evaluate.sheets import ICONS_NOTE


def get_config(arg: str | None = None) -> ConfigDict:
    """See the module.

    Args:
      arg: steps, batch, lr; size, of both towers; concepts, "tiny", "small" or "full" (see
        `mmjax.data.scenes`).
    """
    arg = parse_arg(arg, steps=1600, batch=128, lr=3e-3, size="Xs", concepts="small")
    config = two_towers(
        "siglip", f"steps={arg.steps},batch={arg.batch},lr={arg.lr},size={arg.size}"
    )
    image, text = (config.data.train[name].to_dict() for name in ("image", "text"))

    def data(split: str, augment: tuple = ()) -> dict:
        source = dict(name="tfds", dataset=f"scene_tiles/{arg.concepts}", split=split)
        return dict(
            sources=[source],
            image=image | dict(augment=augment),
            text=dict(max_len=text["max_len"]),
        )

    with config.ignore_type():
        crop = dict(name="random_resized_crop", scale=(0.75, 1.0), ratio=(0.9, 1.1))
        config.data.train = data("seen+heldout", (crop,))
        # Half of the time a name, or a colour and a shape, alone.
        config.data.train.text = dict(max_len=text["max_len"], also="aliases", also_share=0.5)
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
