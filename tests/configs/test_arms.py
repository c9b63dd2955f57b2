"""The arms of the study of connectors: as many tokens as asked for, or what to ask for instead."""

from pathlib import Path

import pytest
from flax import nnx

from mmjax import config as configs
from mmjax import params
from mmjax.config import ConfigError
from mmjax.connectors import cost
from mmjax.models import MODELS
from mmjax.train.handover import model_dataclass

SCENES = str(Path(__file__).parents[2] / "configs/connectors/scenes.py")
# (tokens, res): of scenes as they are drawn, and half as large.
KEEPS = dict.fromkeys(("linear", "mlp"), ((144, 48), (36, 24)))
RESAMPLES = dict.fromkeys(
    ("pooling", "c_abstractor", "perceiver", "qformer", "cross_attention", "pixel_shuffle"),
    ((9, 48), (36, 48)),
)


@pytest.mark.parametrize(("connector", "arms"), (KEEPS | RESAMPLES).items())
def test_arms_make_the_tokens_that_they_are_asked_for(connector, arms):
    for tokens, res in arms:
        config = configs.load(f"{SCENES}:connector={connector},tokens={tokens},res={res}")
        model = model_dataclass(config.model.to_dict())
        encoder = model.encoder
        assert encoder.image_size == res and model.connector.frames == 9
        side = res // encoder.patch_size
        made = cost(model.connector, encoder.width, model.lm.width, (side, side))
        assert made.tokens == tokens
        # About equally large, where there is a size to choose, gated blocks included: within a
        # tenth of the MLP.
        make = MODELS[config.model.name][1]
        _, shapes = params.abstract(lambda make=make, model=model: make(model, rngs=nnx.Rngs(0)))
        joins = [path for path in shapes if not path.startswith(("encoder/", "lm/"))]
        size = sum(shapes[path].size for path in joins)
        assert connector == "linear" or size == pytest.approx(263_296, rel=0.1)


@pytest.mark.parametrize(
    ("arg", "said"),
    [
        ("connector=pooling,tokens=50", "'pooling' .* no 50 of 12 x 12 .* is tokens=49"),
        ("connector=c_abstractor,tokens=400", "'c_abstractor' .* is tokens=144"),
        ("connector=pooling,tokens=49,res=24", "no 49 of 6 x 6 .* is tokens=36"),
        ("connector=pixel_shuffle,tokens=49", "'pixel_shuffle' .* is tokens=36"),
        ("connector=pixel_shuffle,tokens=50", "'pixel_shuffle' .* is tokens=36"),
        ("connector=pixel_shuffle,tokens=0", "is tokens=1"),
        ("connector=linear,tokens=36", "'linear' .* 12 x 12 .* tokens=144, not 36; .* with res"),
        ("connector=mlp,res=24", "'mlp' .* 6 x 6 .* tokens=36, not 144"),
        ("res=50", "res=50 is no multiple of the patch of 12"),
        ("res=0", "res=0 is no multiple of the patch of 12"),
        ("connector=percever", "did you mean 'perceiver'"),
        ("freeze=yess", "did you mean 'yes'"),
    ],
)
def test_budgets_that_cannot_be_met(arg, said):
    with pytest.raises(ConfigError, match=said):
        configs.load(f"{SCENES}:{arg}")
