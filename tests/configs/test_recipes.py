"""The published recipes are what was published; every argument leads somewhere."""

from __future__ import annotations

import inspect
import io
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from mmjax import config as configs
from mmjax import rules
from mmjax.config import ConfigError
from mmjax.data import build_tokenizer, open_train
from mmjax.data.spec import parse
from mmjax.data.tokenizer import Encoded
from mmjax.evaluate import EVALUATORS
from mmjax.params import count
from mmjax.registry import UnknownNameError
from mmjax.train.checkpoints import CheckpointError
from mmjax.train.experiment import load_initial, prepare
from mmjax.train.schedules import SCHEDULES

ROOT = Path(__file__).parents[2] / "configs"
CLIP_B32, CLIP_B16, CLIP_L14, SIGLIP_B16, SO400M, VIT, LIT = RECIPES = tuple(
    str(ROOT / f"{name}.py")
    for name in (
        "clip/b32",
        "clip/b16",
        "clip/l14",
        "siglip/b16",
        "siglip/so400m",
        "vit/s16_imagenet",
        "lit/s16_imagenet",
    )
)
PAIRS = (CLIP_B32, CLIP_B16, CLIP_L14, SIGLIP_B16, SO400M, LIT)


@pytest.mark.parametrize(
    ("spec", "parameters"),
    [
        # Of OpenAI's checkpoints.
        (CLIP_B32, 151_277_313),
        (CLIP_B16, 149_620_737),
        (CLIP_L14, 427_616_513),
        # Of google/siglip-{base-patch16-224,base-patch16-256,so400m-patch14-384} in transformers.
        (SIGLIP_B16 + ":res=224", 203_155_970),
        (SIGLIP_B16, 203_202_050),
        (SO400M + ":res=384", 877_960_498),
        # Of timm's vit_small_patch16_224, less its class token and its 197 learned positions.
        (VIT, 22_050_664 - 384 - 197 * 384),
    ],
)
def test_parameter_counts(spec, parameters):
    assert count(prepare(configs.load(spec)).shapes) == parameters


def test_parameters_in_millions_of_open_clip():
    """docs/model_profile.csv of open_clip; its So400m of 224 pixels reads 16 tokens."""
    shapes = prepare(configs.load(SO400M + ":tokens=16")).shapes
    assert round(count(shapes) / 1e6, 2) == 877.36
    image = {path: leaf for path, leaf in shapes.items() if path.startswith("image/")}
    assert round(count(image) / 1e6, 2) == 427.68


@pytest.mark.parametrize("spec", RECIPES)
def test_a_step_of_the_recipe_is_well_formed(spec):
    """All shapes fit together: model, batch, loss, optimizer; nothing is compiled."""
    experiment = prepare(configs.load(spec))
    state, batch = experiment.abstract_state(), experiment.batch_shapes()
    after, metrics = jax.eval_shape(experiment.step, state, batch)
    assert metrics["loss"].shape == ()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def rate(spec: str, step: int) -> float:
    config = configs.load(spec)
    options = config.optimizer.schedule.to_dict()
    schedule = SCHEDULES[options.pop("name")](config.train.steps, **options)
    return float(config.optimizer.learning_rate * schedule(step))


def test_clip_schedule_is_that_of_open_clip():
    """open_clip's `cosine_lr`, written out, of the published numbers."""
    steps, warmup = 32 * 400_000_000 // 32_768, 2000
    for step in (0, 999, 2000, 100_000, 390_000):
        cosine = 0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup)))
        expected = 5e-4 * (step / warmup if step < warmup else cosine)
        assert rate(CLIP_B32, step) == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_published_numbers():
    for spec, lr in ((CLIP_B32, 5e-4), (CLIP_B16, 5e-4), (CLIP_L14, 4e-4)):
        config = configs.load(spec)
        assert config.optimizer.learning_rate == lr
        assert config.optimizer.options.to_dict() == dict(b1=0.9, b2=0.98, eps=1e-6)
        assert config.optimizer.weight_decay == 0.2
        assert config.train.batch_size == 32_768
        assert config.model.init_scale == pytest.approx(1 / 0.07)
    config = configs.load(SIGLIP_B16)
    assert config.train.steps * config.train.batch_size == pytest.approx(40e9, rel=1e-6)
    assert config.optimizer.options.b2 == 0.95
    assert (config.model.init_scale, config.model.init_bias) == (10.0, -10.0)
    # 90 epochs as big_vision counts them; 12k steps in the paper.
    assert configs.load(VIT).train.steps == pytest.approx(90 * 1_268_355 / 1024, abs=1)
    assert configs.load(LIT).train.steps == pytest.approx(12_000, rel=0.02)


@pytest.mark.parametrize("spec", [SIGLIP_B16, VIT, LIT])
@pytest.mark.parametrize("lr", [1e-3, 3e-4])
def test_big_vision_decay_per_step_does_not_depend_on_the_rate(spec, lr):
    config = configs.load(f"{spec}:lr={lr}").optimizer
    assert config.learning_rate * config.weight_decay == pytest.approx(1e-4)


def test_clip_decays_weights_only():
    table = configs.load(CLIP_B32).rules.weight_decay
    shapes = prepare(configs.load(CLIP_B32)).shapes
    factors = rules.match(table, shapes, name="rules.weight_decay")
    # What OpenAI's modules hold as matrices, the embeddings among them.
    decayed = {path for path, factor in factors.items() if factor}
    assert decayed == {path for path in shapes if path.endswith(("/kernel", "/embedding"))}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_lit_trains_the_text_tower_only(loss):
    experiment = prepare(configs.load(f"{LIT}:loss={loss}"))
    trained = {path for path, yes in experiment.trainable.items() if yes}
    assert trained == {
        path
        for path in experiment.shapes
        if path.startswith(("text", "logit_scale")) or (path, loss) == ("logit_bias", "sigmoid")
    }


def test_lit_takes_all_of_the_image_tower_from_the_vit():
    """Names and shapes are those that configs/vit/s16_imagenet.py trains, but its head."""
    ours, there = (prepare(configs.load(s)).shapes for s in (LIT, VIT))
    image = {
        path.removeprefix("image/"): leaf
        for path, leaf in ours.items()
        if path.startswith("image/")
    }
    assert image == {path: leaf for path, leaf in there.items() if not path.startswith("head/")}


@pytest.mark.parametrize("spec", PAIRS)
def test_arguments_of_pairs(spec):
    config = configs.load(
        f"{spec}:batch=64,steps=20000,res=224,fsdp=2,accumulate=2,dtype=float32,remat=dots,"
        "data=a/{000..010}.tar,text_field=caption.txt,tokenizer=tok,chunked=False,lr=1e-4,"
        "warmup=10,workers=0,imagenet=imagenet2012,retrieval=pairs.csv"
    )
    assert (config.train.batch_size, config.train.steps, config.train.accumulate) == (64, 20_000, 2)
    assert config.mesh.to_dict() == dict(data=-1, fsdp=2, tensor=1)
    assert config.task.chunked is False
    for tower in (config.model.image, config.model.text):
        assert (tower.dtype, tower.remat) == ("float32", "dots")
    assert config.data.tokenizer.directory == "tok"
    assert dict(config.data.train.sources[0]) == dict(
        name="webdataset",
        shards="a/{000..010}.tar",
        image="jpg;jpeg;png;webp",
        text="caption.txt",
    )
    prepare(config)
    check_evaluations(config)
    assert config.evals.imagenet.data.sources[0]["split"] == "validation"
    assert config.evals.retrieval.queries.sources[0]["path"] == "pairs.csv"


def test_arguments_of_imagenet():
    config = configs.load(VIT + ":data=/i/train,val=/i/val,epochs=300,samples=1281167,classes=10")
    assert config.train.steps == round(300 * 1_281_167 / 1024)
    assert dict(config.evals.val.data.sources[0]) == dict(name="folder", root="/i/val")
    assert config.model.num_classes == 10
    check_evaluations(config)
    assert not configs.load(VIT + ":val=none").evals
    with pytest.raises(ConfigError, match="needs val=PATH"):
        configs.load(VIT + ":data=/i/train")


def check_evaluations(config):
    """Their fields exist, and so do those of their data."""
    assert config.evals
    parse(config.data.train)
    for entry in config.evals.values():
        fields = entry.to_dict()
        name = fields.pop("name")
        del fields["every"]
        parameters = inspect.signature(EVALUATORS[name]).parameters
        assert set(fields) <= set(parameters)
        for key in ("data", "queries"):
            if key in fields:
                assert not parse(fields[key]).image.augment


@pytest.mark.parametrize("spec", RECIPES)
def test_a_misspelt_argument_names_the_nearest(spec):
    with pytest.raises(ConfigError, match="did you mean 'batch'"):
        configs.load(spec + ":bacth=64")


def test_bad_values_say_what_to_do():
    with pytest.raises(UnknownNameError, match="did you mean 'webdataset'"):
        configs.load(CLIP_B32 + ":data=/x,kind=webdatset")
    with pytest.raises(ValueError, match="did you mean 'softmax'"):
        prepare(configs.load(LIT + ":loss=sofmax"))
    with pytest.raises(ValueError, match=r"warmup=2000 does not fit into train\.steps=100"):
        prepare(configs.load(CLIP_B32 + ":steps=100"))
    with pytest.raises(ConfigError, match="'lr' must be above 0"):
        configs.load(SIGLIP_B16 + ":lr=0")


class Characters:
    """A tokenizer of code points, in the place of one of transformers."""

    def encode(self, texts, max_len):
        rows = [[ord(c) % 256 for c in text[:max_len]] for text in texts]
        ids = np.array([row + [0] * (max_len - len(row)) for row in rows], np.int32)
        return Encoded(ids, ids > 0, 0)


def test_without_arguments_training_says_what_is_missing(tmp_path):
    config = configs.load(LIT)
    with pytest.raises(ValueError, match=r"add data=PATH after the colon"):
        open_train(config.data, Characters(), batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r"add tokenizer=DIR after the colon"):
        build_tokenizer(config.data, tmp_path)
    with pytest.raises((ValueError, CheckpointError), match=r"add init=WORKDIR after the colon"):
        load_initial(prepare(config))


def picture(index: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), (index * 10, 0, 0)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same eight labelled pictures with captions in each form; paths by kind."""
    root = tmp_path_factory.mktemp("data")
    with tarfile.open(root / "pairs-0.tar", "w") as archive:
        for index in range(8):
            members = dict(jpg=picture(index), txt=f"number {index}".encode(), cls=b"1")
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{index:03d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    for index in range(8):
        place = root / "classes" / f"class{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.jpg").write_bytes(picture(index))
    lines = [f"classes/class{i % 2}/{i}.jpg,number {i},{i % 2}" for i in range(8)]
    (root / "pairs.csv").write_text("\n".join(["image,text,label", *lines]))
    return dict(
        webdataset=str(root / "pairs-{0..0}.tar"),
        folder=str(root / "classes"),
        table=str(root / "pairs.csv"),
    )


@pytest.mark.parametrize("kind", ["webdataset", "folder", "table"])
def test_each_kind_of_data_is_read(kind, data):
    pairs = configs.load(f"{CLIP_B32}:data={data[kind]},res=32,workers=0")
    assert pairs.data.train.sources[0]["name"] == kind
    loader = open_train(pairs.data, Characters(), batch_size=4, seed=0)
    batch = next(loader)
    loader.close()
    assert batch.arrays["image"].shape == (4, 32, 32, 3)
    assert batch.arrays["text"].shape == (4, 77) and not batch.skipped

    labels = configs.load(f"{VIT}:data={data[kind]},val={data[kind]},res=32,workers=0")
    loader = open_train(labels.data, None, batch_size=4, seed=0)
    batch = next(loader)
    loader.close()
    assert set(batch.arrays["label"].tolist()) <= {0, 1} and not batch.skipped


def test_the_tfds_split_may_stand_in_the_path():
    source = configs.load(CLIP_B32 + ":data=coco_captions/2014@train[:5%]").data.train.sources[0]
    assert dict(source) == dict(name="tfds", dataset="coco_captions/2014", split="train[:5%]")
