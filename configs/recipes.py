"""The published recipes, and what they share: arguments, steps, evaluations.

Arguments that every recipe takes (after the colon of --config, as "key=value,key=value"):

- `data`: the training data: tars ("/data/cc12m/{00000..01242}.tar", or a glob), a table
  ("pairs.parquet"; .csv, .tsv), a folder of classes ("/data/imagenet/train") or a TFDS data set
  ("imagenet2012@train"). `kind` says which of webdataset, table, folder, tfds it is where the path
  does not (see `configs.streams.infer_kind`).
- `image_field` and `text_field` or `label_field`: where its records hold them; for tars the
  suffixes of members ("jpg", "txt", "cls"), else names of columns or features. Empty: the usual.
- `batch`, `steps` (0: computed from the published number of examples), `warmup`, `lr`. The
  published values are for the published batch; none is derived from another `batch`.
- `res`, `dtype`, `remat`, `fsdp`, `accumulate`, `workers`: of the model and the hardware. Their
  defaults are this project's choices: the papers' machines were others.

Those of image-text pairs also take `tokenizer` (the directory of a Hugging Face tokenizer),
`chunked`, `imagenet` (labelled ImageNet images, for zero-shot classification) and `retrieval`
(image-text pairs to search in), in the same forms as `data`. An evaluation whose data are not given
is left out. `weights` and `towers` start from a checkpoint (see `configs.weights`), whose tokenizer
is then the default.

Without `data` and `tokenizer` a config can be looked at, planned (`experiments.plan`) and timed;
training then stops at once and says which argument is missing.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from configs import weights
from configs.streams import stream
from mmjax.config import ConfigError, parse_arg
from mmjax.models.sizes import text_size, vit_size
from mmjax.train.experiment import base_config

NO_DATA = "no data set was given, add data=PATH after the colon of --config"
NO_TOKENIZER = "no tokenizer was given, add tokenizer=DIR after the colon of --config"
NO_INIT = "no trained image tower was given, add init=WORKDIR after the colon of --config"

EVERYWHERE = dict(
    data="",
    kind="",
    image_field="",
    workers=8,
    steps=0,
    dtype="bfloat16",
    remat="none",
    fsdp=1,
    accumulate=1,
)
_PAIRS = dict(
    text_field="", tokenizer="", imagenet="", retrieval="", chunked=True, **weights.ARGUMENTS
)

# Also big_vision's: steps between rows of metrics, and between checkpoints.
LOG_EVERY, CHECKPOINT_EVERY = 50, 1000

# CLIP decays "all weights that are not gains or biases" (section 2.5). Scalars and the class token,
# a vector, are taken for biases, as open_clip takes them (its test is ndim < 2).
_CLIP_DECAY = ((r"(.*/)?(scale|bias|class_token)|logit_scale", 0.0), (".*", 1.0))

BIG_VISION = dict(activation="gelu_tanh", norm_eps=1e-6)


def loading(arg: ConfigDict, train: dict, tokenizer: dict | None) -> dict[str, Any]:
    return dict(
        tokenizer=tokenizer,
        train=train,
        workers=arg.workers,
        threads=2,
        prefetch=arg.workers,
        max_bad_share=0.01,
    )


def train_stream(arg: ConfigDict, second: str, **image_and_text: Any) -> dict[str, Any]:
    """The training stream of `data`, with "text" or "label" beside the images."""
    fields = {"image": arg.image_field, second: arg[f"{second}_field"]}
    # A shard of that name does not exist: opening it says so, and with it what to do.
    kind = arg.kind if arg.data else "webdataset"
    return stream(arg.data or NO_DATA, kind=kind, split="train", fields=fields, **image_and_text)


def updates(arg: ConfigDict, examples: float) -> int:
    return arg.steps or max(round(examples / arg.batch), 1)


def _pairs(
    arg: ConfigDict,
    *,
    loss: str,
    model: dict[str, Any],
    examples: float,
    optimizer: dict[str, Any],
    preset: str,
    augment: tuple = (),
    **groups: Any,
) -> ConfigDict:
    """A recipe for two towers; `groups` are further groups of the config."""
    model, start = weights.pair(model, arg.weights, arg.towers)
    groups["init"] = (*start, *groups.get("init", ()))
    of_images = dict(preset=preset, size=model["image"]["image_size"])
    max_len = model["text"]["max_len"]
    evals = {}
    if arg.imagenet:
        evals["imagenet"] = dict(
            name="zero_shot",
            every=5000,
            classes="imagenet",
            prompts="openai_80",
            max_len=max_len,
            data=stream(
                arg.imagenet, split="validation", fields=dict(image="", label=""), **of_images
            ),
        )
    if arg.retrieval:
        evals["retrieval"] = dict(
            name="retrieval",
            every=5000,
            queries=stream(
                arg.retrieval,
                split="val",
                fields=dict(image="", text=""),
                max_len=max_len,
                **of_images,
            ),
        )
    tokenizer = dict(name="hf", directory=arg.tokenizer or arg.weights or NO_TOKENIZER)
    train = train_stream(arg, "text", max_len=max_len, augment=augment, **of_images)
    return base_config(
        task=dict(name="contrastive", loss=loss, chunked=arg.chunked),
        model=model,
        data=loading(arg, train, tokenizer),
        optimizer=dict(
            name="adamw",
            learning_rate=arg.lr,
            schedule=dict(name="cosine", warmup=arg.warmup),
            **optimizer,
        ),
        train=dict(
            steps=updates(arg, examples),
            batch_size=arg.batch,
            log_every=LOG_EVERY,
            accumulate=arg.accumulate,
        ),
        checkpoint=dict(every=CHECKPOINT_EVERY),
        mesh=dict(fsdp=arg.fsdp),
        evals=evals,
        **groups,
    )


def clip(
    image: str, arg: str | None, *, text: str, embed_dim: int, lr: float, remat: str = "none"
) -> ConfigDict:
    """CLIP with a vision transformer: Radford et al., "Learning Transferable Visual Models From
    Natural Language Supervision" (2021), section 2 and tables 18 (common) and 20 (ViT).

    From the paper: 32 epochs of 400 million pairs in batches of 32,768; AdamW with b1 = 0.9,
    b2 = 0.98, epsilon = 1e-6; 2,000 warm-up steps, then a cosine; weight decay 0.2 on what is no
    gain or bias; temperature from 0.07, logits scaled by at most 100; no gradient clipping is
    mentioned. PyTorch's AdamW multiplies the decay by the learning rate, and so does ours: 0.2
    stands as it is. From OpenAI's code: quick GELU, norm epsilon 1e-5, a norm before the first
    block, no bias in the patch embedding, 77 tokens of a vocabulary of 49,408, pooled at the
    largest id, which is the end of text.

    Ours: bfloat16, where OpenAI used float16 with half-precision Adam statistics; random crops of
    90% to 100% of the area (open_clip's) for the paper's "random square crop from resized images";
    the initialisation of mmjax's layers. Not covered: the further epoch at 336 pixels.

    Args:
      image: of the image tower, e.g. "B/32".
      arg: see the head of this file; also `epochs` and `samples`, the size of the data set.
      text: size of the text tower, whose width the paper scales with the model, not its depth.
      embed_dim: width of the shared space.
      lr: the peak learning rate.
      remat: the default of the argument.
    """
    arg = parse_arg(
        arg,
        **{**EVERYWHERE, "remat": remat},
        **_PAIRS,
        batch=32_768,
        epochs=32.0,
        samples=400_000_000,
        res=224,
        lr=lr,
        warmup=2000,
    )
    common = dict(activation="quick_gelu", norm_eps=1e-5, dtype=arg.dtype, remat=arg.remat)
    model = dict(
        name="clip",
        image=dict(
            image_size=arg.res,
            **vit_size(image),
            pooling="cls",
            position="learned",
            pre_norm=True,
            patch_bias=False,
            **common,
        ),
        text=dict(
            vocab_size=49_408,
            max_len=77,
            **text_size(text),
            attention="causal",
            pooling="argmax",
            padding="attend",
            **common,
        ),
        embed_dim=embed_dim,
        init_scale=1 / 0.07,
    )
    return _pairs(
        arg,
        loss="softmax",
        model=model,
        examples=arg.epochs * arg.samples,
        optimizer=dict(weight_decay=0.2, clip_norm=None, options=dict(b1=0.9, b2=0.98, eps=1e-6)),
        preset="clip",
        augment=(dict(name="random_resized_crop", scale=(0.9, 1.0)),),
        rules=dict(weight_decay=_CLIP_DECAY),
    )


def siglip(image: str, arg: str | None, *, res: int, remat: str = "none") -> ConfigDict:
    """SigLIP from scratch: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023),
    section 4.6 ("scaling up"), the recipe of the released models.

    From the paper: both towers of one size, 40 billion examples in batches of 32k, 256 patches,
    64 tokens of a vocabulary of 32,000, logits starting at scale 10 and bias -10 (section 4.9),
    images resized and not augmented, b2 = 0.95 (4.7), learning rate 1e-3 and weight decay 1e-4
    (appendix C), a cosine schedule. From big_vision: MAP pooling of the image, the last of the
    text's tokens, GELU by tanh, norm epsilon 1e-6, decay of kernels only. From SigLIP 2 (Tschannen
    et al., 2025, section 2.1), since the first paper does not say: 20,000 warm-up steps and
    gradients clipped to norm 1.

    Weight decay: at each step big_vision subtracts schedule x decay x parameter, ours rate x
    schedule x decay x parameter. Its 1e-4 at a rate of 1e-3 is 0.1 here; with another `lr` the
    decay per step stays what it was, as in big_vision.

    Ours: AdamW, with which the paper's table 7 finds the same accuracy as with its ViT-Adafactor
    (70.3 and 70.1), and which SigLIP 2 uses; bicubic resizing, as the released models are used in
    transformers. Not covered: the 5 billion further examples at a higher resolution (100 times
    smaller rate, no decay).

    Args:
      image: of the image tower, e.g. "B/16"; the text tower has the same size.
      arg: see the head of this file; also `examples`, to be seen in all, and `tokens`.
      res: the default of the argument: 16 x 16 patches.
      remat: likewise.
    """
    arg = parse_arg(
        arg,
        **{**EVERYWHERE, "remat": remat},
        **_PAIRS,
        batch=32_768,
        examples=40e9,
        res=res,
        tokens=64,
        lr=1e-3,
        warmup=20_000,
    )
    common = dict(**BIG_VISION, dtype=arg.dtype, remat=arg.remat)
    model = dict(
        name="siglip",
        image=dict(
            image_size=arg.res,
            **vit_size(image),
            pooling="map",
            position="learned",
            # Of 384 pixels, patches of 14 cover 378: big_vision leaves the rest out.
            partial_patches="crop",
            **common,
        ),
        text=_text_tower(image.partition("/")[0], arg.tokens, common),
        init_scale=10.0,
        init_bias=-10.0,
    )
    return _pairs(
        arg,
        loss="sigmoid",
        model=model,
        examples=arg.examples,
        optimizer=dict(
            weight_decay=big_vision_decay(1e-4, arg.lr),
            clip_norm=1.0,
            options=dict(b1=0.9, b2=0.95),
        ),
        preset="siglip",
    )


def lit(arg: str | None) -> ConfigDict:
    """Locked-image tuning: Zhai et al., "LiT: Zero-Shot Transfer with Locked-image text Tuning"
    (2022), the public set-up of appendix D: a trained image tower stays as it is, a text tower
    learns to read it.

    From the paper: 20 epochs of CC12M (10 million pairs) in batches of 16,384; Adam with b1 = 0.9,
    b2 = 0.999, learning rate 1e-3, decoupled weight decay 1e-4, 2,000 warm-up steps, a cosine,
    gradients clipped to norm 1; Inception crops of 224 pixels in training, plain bilinear resizing
    in evaluation; 16 tokens; a linear head on the text tower only; softmax loss.

    Weight decay: as in `siglip`, 1e-4 of the rate's schedule is 0.1 here.

    Ours: a text tower trained from scratch, a transformer like ViT-B with a vocabulary of 32,000
    (one of those of section 5.4), where appendix D begins with BERT; an image tower trained by
    configs/vit/s16_imagenet.py, where the paper takes one trained on ImageNet-21k (it finds, in
    section 5.3, that narrowly trained towers are good at their own task only: expect ImageNet to
    look better than all else); logits starting at scale 10, as in big_vision's configs.

    Args:
      arg: see the head of this file; also `init`, the work directory of the image tower's run;
        `size`, `pooling` and `position`, which must be those of that run; `text`, the size of the
        text tower; `tokens`; `epochs` and `samples`; `loss`, softmax or sigmoid (SigLiT).
    """
    arg = parse_arg(
        arg,
        **EVERYWHERE,
        **_PAIRS,
        init="",
        size="S/16",
        pooling="mean",
        position="sincos2d",
        text="B",
        tokens=16,
        loss="softmax",
        batch=16_384,
        epochs=20.0,
        samples=10_000_000,
        res=224,
        lr=1e-3,
        warmup=2000,
    )
    common = dict(**BIG_VISION, dtype=arg.dtype, remat=arg.remat)
    model = dict(
        name="siglip",
        image=dict(
            image_size=arg.res,
            **vit_size(arg.size),
            pooling=arg.pooling,
            position=arg.position,
            **common,
        ),
        text=_text_tower(arg.text, arg.tokens, common),
        init_scale=10.0,
        init_bias=-10.0,
    )
    # The softmax does not see the bias: nothing would train it.
    locked = r"image/.*|logit_bias" if arg.loss == "softmax" else r"image/.*"
    return _pairs(
        arg,
        loss=arg.loss,
        model=model,
        examples=arg.epochs * arg.samples,
        optimizer=dict(
            weight_decay=big_vision_decay(1e-4, arg.lr),
            clip_norm=1.0,
            options=dict(b1=0.9, b2=0.999),
        ),
        preset="vit",
        augment=(inception_crop(),),
        rules=dict(trainable=((locked, False), (".*", True))),
        init=() if arg.weights else ((r"image/(.*)", arg.init or NO_INIT, r"\1"),),
    )


def _text_tower(size: str, tokens: int, common: dict[str, Any]) -> dict[str, Any]:
    """The text tower of SigLIP: a transformer without a causal mask, read at its last position."""
    return dict(
        vocab_size=32_000,
        max_len=tokens,
        **text_size(size),
        attention="bidirectional",
        pooling="last",
        padding="attend",
        **common,
    )


def big_vision_decay(decay: float, lr: float) -> float:
    """A weight decay of big_vision's, which its learning rate does not multiply, as one of ours."""
    if lr <= 0:
        raise ConfigError(f"The argument 'lr' must be above 0, not {lr}.")
    return decay / lr


def inception_crop() -> dict[str, Any]:
    """big_vision's `inception_crop`: at least 5% of the area, bilinear."""
    return dict(name="random_resized_crop", scale=(0.05, 1.0), resample="bilinear")
