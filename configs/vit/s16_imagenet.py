"""A ViT-S/16 on ImageNet, the published recipe.

    python -m experiments.train --workdir DIR --config configs/vit/s16_imagenet.py
    ... --config configs/vit/s16_imagenet.py:data=/data/train,val=/data/val,samples=1281167

The first reads the TFDS data set imagenet2012, prepared as array_record files in $TFDS_DATA_DIR.
`epochs=300` is the longer of the published runs.

Source: Beyer et al., "Better plain ViT baselines for ImageNet-1k" (2022), and
big_vision's `configs/vit_s16_i1k.py`, which reaches 76.5% in 90 epochs.

From there: 90 epochs of 99% of the training set in batches of 1,024; Adam (first moment in
bfloat16) at 1e-3, weight decay 1e-4, 10,000 warm-up steps, a cosine, gradients clipped to norm
1; Inception crop, flip, RandAugment(2, 10), mixup 0.2; sine-cosine positions, mean of the
patches, no dropout. The head is linear, as the paper has it (big_vision's config puts a tanh
layer before it).

Weight decay: as in `configs.recipes.siglip`, 1e-4 at a rate of 1e-3 is 0.1 here.

RandAugment: magnitudes of big_vision end at 10, ours (torchvision's) at 30, so its 10 is our
30: shear 0.3, 30 degrees, 100 pixels, factors of 1.9. Of its operations ours lacks cutout and
solarize-add, and our brightness, colour, contrast and sharpness also go down.

Ours: evaluation squashes the whole image to the square, where big_vision resizes the short side
to 256 and crops 224; bfloat16.

Arguments: those at the head of `configs.recipes`; also `size`, `classes`, `val` (validation data;
"none" leaves the evaluation out), `epochs` and `samples`, the size of the data set, and `weights`,
a directory of Hugging Face format to take the tower from (see `configs.weights`).
"""

from ml_collections import ConfigDict

from configs import weights
from configs.recipes import (
    BIG_VISION,
    CHECKPOINT_EVERY,
    EVERYWHERE,
    LOG_EVERY,
    big_vision_decay,
    inception_crop,
    loading,
    train_stream,
    updates,
)
from configs.streams import stream
from mmjax.config import ConfigError, parse_arg
from mmjax.models.sizes import vit_size
from mmjax.train.experiment import base_config


def get_config(arg: str | None = None) -> ConfigDict:
    tfds_val = "imagenet2012@validation"
    arg = parse_arg(
        arg,
        **EVERYWHERE | dict(data="imagenet2012@train[:99%]"),
        label_field="",
        val=tfds_val,
        size="S/16",
        classes=1000,
        batch=1024,
        epochs=90.0,
        samples=1_268_355,
        res=224,
        lr=1e-3,
        warmup=10_000,
        weights="",
    )
    if not arg.data.startswith("imagenet2012") and arg.val == tfds_val:
        raise ConfigError(
            f"data={arg.data} needs val=PATH beside it: the validation images; val=none for no "
            "evaluation."
        )
    of_images = dict(preset="vit", size=arg.res)
    augment = (
        inception_crop(),
        dict(name="flip"),
        dict(name="rand_augment", layers=2, magnitude=30.0),
    )
    evals = {}
    if arg.val != "none":
        evals["val"] = dict(
            name="classification",
            every=2500,
            data=stream(
                arg.val,
                split="validation",
                fields=dict(image=arg.image_field, label=arg.label_field),
                **of_images,
            ),
        )
    model = dict(
        name="vit",
        image_size=arg.res,
        **vit_size(arg.size),
        pooling="mean",
        position="sincos2d",
        num_classes=arg.classes,
        **BIG_VISION,
        dtype=arg.dtype,
        remat=arg.remat,
    )
    model, init = weights.image_tower(model, arg.weights)
    return base_config(
        task=dict(name="classification", label_smoothing=0.0, mixup=0.2),
        model=model,
        init=init,
        data=loading(arg, train_stream(arg, "label", augment=augment, **of_images), tokenizer=None),
        optimizer=dict(
            name="adamw",
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=arg.warmup),
            weight_decay=big_vision_decay(1e-4, arg.lr),
            clip_norm=1.0,
            options=dict(b1=0.9, b2=0.999, mu_dtype="bfloat16"),
        ),
        train=dict(
            steps=updates(arg, arg.epochs * arg.samples),
            batch_size=arg.batch,
            log_every=LOG_EVERY,
            accumulate=arg.accumulate,
        ),
        checkpoint=dict(every=CHECKPOINT_EVERY),
        mesh=dict(fsdp=arg.fsdp),
        evals=evals,
    )
