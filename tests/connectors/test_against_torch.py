"""Connectors against modules of transformers and PyTorch that carry the same weights.

Where transformers has no such module, it is written here from the formulas of its paper.
"""

import types

import hf
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from functional import jitted

from mmjax.connectors import (
    AlignConfig,
    CAbstractorConfig,
    DAbstractorConfig,
    Idefics2Config,
    LDPConfig,
    LDPv2Config,
    PerceiverConfig,
    PoolingConfig,
    TokenPackerConfig,
    make_connector,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

INPUTS, WIDTH, OUTPUTS = 12, 16, 24


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compare(config, reference, table, run, features, grid, mask=None, *, atol=2e-6):
    """The connector with the weights of `reference` gives what `run` makes of the features."""
    connector = make_connector(config, features.shape[-1], OUTPUTS, rngs=nnx.Rngs(0))
    hf.load(hf.randomise(reference), table, connector)
    with torch.no_grad():
        expected = run(torch.tensor(features))
    call = jitted(connector, lambda connector, *args: connector(*args, grid)[0])
    actual = call(jnp.asarray(features), None if mask is None else jnp.asarray(mask))
    assert actual.shape[1] == config.tokens(grid)
    np.testing.assert_allclose(actual, expected, atol=atol)


def as_grid(x, height, width):
    """[B, N, D] -> [B, D, h, w]"""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)


def as_rows(x):
    return x.flatten(2).transpose(1, 2)


def test_align():
    """softmax(LayerNorm(W2 LayerNorm(W1 f))) E, as the paper of AlignVLM has it."""
    vocabulary = 40
    reference = torch.nn.ModuleDict(
        {
            "w1": torch.nn.Linear(INPUTS, OUTPUTS),
            "norm": torch.nn.LayerNorm(OUTPUTS),
            "w2": torch.nn.Linear(OUTPUTS, vocabulary, bias=False),
            "w2_norm": torch.nn.LayerNorm(vocabulary),
            "words": torch.nn.Embedding(vocabulary, OUTPUTS),
        }
    )

    def run(x):
        hidden = reference["norm"](reference["w1"](x))
        shares = torch.softmax(reference["w2_norm"](reference["w2"](hidden)), dim=-1)
        return shares @ reference["words"].weight

    table = {
        "w1": "hidden",
        "norm": "norm",
        r"w2\.weight": "head/embedding",
        "w2_norm": "head_norm",
        r"words\.weight": "token/embedding",
    }
    features = draw(2, 6, INPUTS)
    compare(AlignConfig(vocabulary), reference, table, run, features, (2, 3))


@pytest.mark.parametrize(("grid", "target"), [((8, 6), (4, 3)), ((7, 5), (3, 4)), ((5, 5), (5, 5))])
def test_pooling(grid, target):
    reference = torch.nn.Sequential(torch.nn.Linear(INPUTS, OUTPUTS))

    def run(x):
        means = torch.nn.functional.adaptive_avg_pool2d(as_grid(x, *grid), target)
        return reference(as_rows(means))

    features = draw(2, grid[0] * grid[1], INPUTS)
    table = {"0": "projection/projection"}
    compare(PoolingConfig(target), reference, table, run, features, grid)


@pytest.mark.parametrize(("qk_norm", "frames"), [(True, 1), (False, 3)])
def test_perceiver_equals_that_of_idefics(qk_norm, frames):
    """IDEFICS has no vectors for places in time; they are added to its features here."""
    hf.transformers()
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    width, heads, head_dim, latents = OUTPUTS, 2, 8, 5
    config = types.SimpleNamespace(
        vision_config=types.SimpleNamespace(embed_dim=width),
        perceiver_config=types.SimpleNamespace(qk_layer_norms_perceiver=qk_norm),
    )
    reference = IdeficsPerceiverResampler(config, width, 2, heads, head_dim, latents)
    block = "resampler/blocks/layers"
    table = {
        "time": "time",
        "latents": "resampler/latents",
        "layer_norm": "resampler/final_norm",
        r"blocks\.(\d+)\.0\.context_layer_norm": f"{block}/context_norm",
        r"blocks\.(\d+)\.0\.latents_layer_norm": f"{block}/attention_norm",
        r"blocks\.(\d+)\.0\.q_layer_norm": f"{block}/attention/query_norm",
        r"blocks\.(\d+)\.0\.k_layer_norm": f"{block}/attention/key_norm",
        r"blocks\.(\d+)\.0\.q_proj": f"{block}/attention/query",
        r"blocks\.(\d+)\.0\.k_proj": f"{block}/attention/key",
        r"blocks\.(\d+)\.0\.v_proj": f"{block}/attention/value",
        r"blocks\.(\d+)\.0\.output_proj": f"{block}/attention/out",
        r"blocks\.(\d+)\.1\.ln": f"{block}/mlp_norm",
        r"blocks\.(\d+)\.1\.fc": f"{block}/mlp/up",
        r"blocks\.(\d+)\.1\.c_proj": f"{block}/mlp/down",
    }
    if frames > 1:
        reference.time = torch.nn.Parameter(torch.zeros(frames, width))

    def run(x):
        if frames > 1:
            x = x + reference.time.repeat_interleave(x.shape[1] // frames, dim=0)
        return reference(x)

    ours = PerceiverConfig(
        latents=latents,
        depth=2,
        heads=heads,
        head_dim=head_dim,
        activation="relu",
        qk_norm=qk_norm,
        frames=frames,
        projection=None,
    )
    compare(ours, reference, table, run, draw(2, frames * 6, width), (2, 3))


def test_idefics2_with_padding():
    transformers = hf.transformers()
    from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

    config = transformers.Idefics2Config(
        vision_config=dict(hidden_size=INPUTS),
        text_config=dict(
            model_type="mistral", hidden_size=OUTPUTS, intermediate_size=40, hidden_act="silu"
        ),
        perceiver_config=dict(
            hidden_size=OUTPUTS,
            resampler_n_latents=5,
            resampler_depth=2,
            resampler_n_heads=4,
            resampler_head_dim=8,
            num_key_value_heads=2,
            rms_norm_eps=1e-3,
        ),
        attn_implementation="eager",
    )
    reference = Idefics2Connector(config)
    block = "resampler/blocks/layers"
    table = {
        r"modality_projection\.gate_proj": "projection/gate",
        r"modality_projection\.up_proj": "projection/up",
        r"modality_projection\.down_proj": "projection/down",
        r"perceiver_resampler\.latents": "resampler/latents",
        r"perceiver_resampler\.norm": "resampler/final_norm",
        r"perceiver_resampler\.layers\.(\d+)\.input_context_norm": f"{block}/context_norm",
        r"perceiver_resampler\.layers\.(\d+)\.input_latents_norm": f"{block}/attention_norm",
        r"perceiver_resampler\.layers\.(\d+)": block,
    }
    ours = Idefics2Config(5, 2, heads=4, kv_heads=2, head_dim=8, hidden=40, norm_eps=1e-3)
    mask = np.arange(6) < np.array([[6], [4]])

    def run(x):
        return reference(x, torch.tensor(mask))

    compare(ours, reference, table, run, draw(2, 6, INPUTS), (2, 3), mask)


def test_c_abstractor_has_the_blocks_of_regnet():
    """Of transformers, but with the norms and the activation that Honeybee has in them."""
    transformers = hf.transformers()
    from transformers.models.regnet.modeling_regnet import RegNetYLayer

    class Norm(torch.nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    def block(inputs):
        config = transformers.RegNetConfig(groups_width=1, hidden_act="silu")
        layer = RegNetYLayer(config, inputs, WIDTH)
        for module in layer.modules():
            if hasattr(module, "normalization"):
                module.normalization = Norm(WIDTH)
        layer.layer[2].attention[1] = torch.nn.SiLU()
        return layer

    parts = {
        r"layer\.0\.convolution": "expand",
        r"layer\.0\.normalization": "expand_norm",
        r"layer\.1\.convolution": "conv",
        r"layer\.1\.normalization": "conv_norm",
        r"layer\.2\.attention\.0": "gate/squeeze",
        r"layer\.2\.attention\.2": "gate/excite",
        r"layer\.3\.convolution": "project",
        r"layer\.3\.normalization": "project_norm",
        r"shortcut\.convolution": "shortcut",
        r"shortcut\.normalization": "shortcut_norm",
    }
    reference = torch.nn.ModuleDict(
        {
            "before": torch.nn.Sequential(block(INPUTS), block(WIDTH)),
            "after": torch.nn.Sequential(block(WIDTH), block(WIDTH)),
            "readout": torch.nn.Sequential(
                torch.nn.Linear(WIDTH, OUTPUTS), torch.nn.SiLU(), torch.nn.Linear(OUTPUTS, OUTPUTS)
            ),
        }
    )
    table = {
        rf"{stage}\.{index}\.{theirs}": f"{stage}/{index}/{ours}"
        for stage in ("before", "after")
        for index in range(2)
        for theirs, ours in parts.items()
    }
    table |= {
        r"readout\.0": "projection/linears/0",
        r"readout\.2": "projection/linears/1",
    }

    def run(x):
        x = torch.nn.functional.adaptive_avg_pool2d(reference["before"](as_grid(x, 5, 7)), (2, 3))
        return reference["readout"](as_rows(reference["after"](x)))

    config = CAbstractorConfig((2, 3), WIDTH, 2)
    compare(config, reference, table, run, draw(2, 35, INPUTS), (5, 7))


def test_d_abstractor_is_the_decoder_of_deformable_detr():
    """With a mask, offsets that leave the image, and queries and places as Honeybee has them."""
    transformers = hf.transformers()
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrDecoderLayer,
    )

    grid, target, queries = (5, 4), (3, 2), 6
    config = transformers.DeformableDetrConfig(
        d_model=WIDTH,
        decoder_attention_heads=2,
        decoder_ffn_dim=20,
        decoder_n_points=3,
        num_feature_levels=1,
        disable_custom_kernels=True,
        attn_implementation="eager",
    )
    reference = torch.nn.Module()
    reference.embed = torch.nn.Linear(INPUTS, WIDTH)
    reference.decoder = torch.nn.ModuleList(DeformableDetrDecoderLayer(config) for _ in range(2))
    reference.queries = torch.nn.Parameter(torch.zeros(queries, WIDTH))
    reference.shift = torch.nn.Parameter(torch.zeros(queries, 2))
    reference.out = torch.nn.Linear(WIDTH, OUTPUTS)
    block = "decoder/layers"
    table = {
        "embed": "embed",
        "queries": "queries",
        "shift": "shift",
        "out": "projection/projection",
        r"decoder\.(\d+)\.self_attn_layer_norm": f"{block}/attention_norm",
        r"decoder\.(\d+)\.encoder_attn_layer_norm": f"{block}/cross_norm",
        r"decoder\.(\d+)\.final_layer_norm": f"{block}/mlp_norm",
        r"decoder\.(\d+)\.encoder_attn\.sampling_offsets": f"{block}/cross/offsets",
        r"decoder\.(\d+)\.encoder_attn\.attention_weights": f"{block}/cross/weights",
        r"decoder\.(\d+)\.encoder_attn\.value_proj": f"{block}/cross/value",
        r"decoder\.(\d+)\.encoder_attn\.output_proj": f"{block}/cross/out",
        r"decoder\.(\d+)": block,
    }

    def run(x):
        x = reference.embed(x)
        down = torch.linspace(0.5, grid[0] - 0.5, target[0]) / grid[0]
        across = torch.linspace(0.5, grid[1] - 0.5, target[1]) / grid[1]
        y, x_place = torch.meshgrid(down, across, indexing="ij")
        places = torch.stack([x_place.flatten(), y.flatten()], -1) + reference.shift
        position = as_rows(torch.nn.functional.adaptive_avg_pool2d(as_grid(x, *grid), target))
        states = reference.queries.expand(2, -1, -1)
        for layer in reference.decoder:
            states = layer(
                states,
                object_queries_position_embeddings=position,
                reference_points=places[None, :, None].expand(2, -1, -1, -1),
                spatial_shapes=torch.tensor([grid]),
                spatial_shapes_list=[grid],
                level_start_index=torch.tensor([0]),
                encoder_hidden_states=x,
            )
        return reference.out(states)

    ours = DAbstractorConfig(target, WIDTH, 2, heads=2, mlp_width=20, points=3)
    features = draw(2, 20, INPUTS)
    compare(ours, reference, table, run, features, grid, atol=1e-5)


@pytest.mark.parametrize(("factor", "grid"), [(2, (4, 6)), (3, (3, 6))])
def test_token_packer(factor, grid):
    """Attention is PyTorch's; squares are cut out as `unfold` does."""
    nn, levels = torch.nn, 2
    coarse = (grid[0] // factor, grid[1] // factor)

    def mlp():
        return nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    reference = nn.ModuleDict(
        {
            "query": nn.Linear(INPUTS // levels, WIDTH, bias=False),
            "query_norm": nn.LayerNorm(WIDTH, eps=1e-6),
            "key": mlp(),
            "key_norm": nn.LayerNorm(WIDTH, eps=1e-6),
            "value": mlp(),
            "value_norm": nn.LayerNorm(WIDTH, eps=1e-6),
            "attention": nn.MultiheadAttention(WIDTH, 2, batch_first=True),
            "out": nn.Sequential(nn.Linear(WIDTH, OUTPUTS), nn.GELU(), nn.Linear(OUTPUTS, OUTPUTS)),
        }
    )
    table = {
        r"query_norm": "coarse_norm",
        r"query": "coarse",
        r"key_norm": "keys_norm",
        r"key\.0": "keys/up",
        r"key\.2": "keys/down",
        r"value_norm": "values_norm",
        r"value\.0": "values/up",
        r"value\.2": "values/down",
        r"attention\.q_proj": "attention/query",
        r"attention\.k_proj": "attention/key",
        r"attention\.v_proj": "attention/value",
        r"attention\.out_proj": "attention/out",
        r"out\.0": "projection/linears/0",
        r"out\.2": "projection/linears/1",
    }

    def squares(x):
        cut = nn.functional.unfold(as_grid(x, *grid), factor, stride=factor)
        cut = cut.reshape(x.shape[0], x.shape[2], factor**2, -1)
        return cut.permute(0, 3, 2, 1).flatten(0, 1)

    def run(x):
        last = as_grid(x[..., INPUTS // levels :], *grid)
        query = as_rows(nn.functional.interpolate(last, coarse, mode="bilinear"))
        query = reference["query_norm"](reference["query"](query))
        key = squares(reference["key_norm"](reference["key"](x)))
        value = squares(reference["value_norm"](reference["value"](x)))
        seen, _ = reference["attention"](query.flatten(0, 1)[:, None], key, value)
        return reference["out"](seen.reshape(query.shape))

    config = TokenPackerConfig(factor, levels, WIDTH, 2)
    compare(config, reference, table, run, draw(2, grid[0] * grid[1], INPUTS), grid)


def ldp_mlp():
    nn = torch.nn
    return nn.Sequential(nn.Linear(INPUTS, OUTPUTS), nn.GELU(), nn.Linear(OUTPUTS, OUTPUTS))


def test_ldp():
    """Howard et al., 2019, section 5, with the options of MobileVLM's implementation."""
    nn, width = torch.nn, OUTPUTS

    class Block(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False)
            self.conv_norm = nn.LayerNorm(width)
            self.squeeze, self.excite = nn.Linear(width, 8), nn.Linear(8, width)
            self.project = nn.Linear(width, width, bias=False)
            self.project_norm = nn.LayerNorm(width)
            self.stride = stride

        def forward(self, x):  # [B, h, w, D]
            y = self.conv(x.movedim(-1, 1)).movedim(1, -1)
            y = nn.functional.hardswish(self.conv_norm(y))
            gate = self.excite(self.squeeze(y.mean((1, 2), keepdim=True)).relu())
            y = self.project_norm(self.project(y * nn.functional.hardsigmoid(gate)))
            return x + y if self.stride == 1 else y

    reference = nn.ModuleDict({"mlp": ldp_mlp(), "block": Block(1), "halve": Block(2)})
    table = {r"mlp\.0": "mlp/up", r"mlp\.2": "mlp/down"}
    for name in ("block", "halve"):
        table |= {rf"{name}\.{part}": f"{name}/gate/{part}" for part in ("squeeze", "excite")}
        table[name] = name

    def run(x):
        x = reference["mlp"](x).reshape(2, 5, 6, width)
        return reference["halve"](reference["block"](x)).flatten(1, 2)

    compare(LDPConfig(), reference, table, run, draw(2, 30, INPUTS), (5, 6), atol=1e-5)


def test_ldp_v2():
    nn = torch.nn
    conv = nn.Conv2d(OUTPUTS, OUTPUTS, 3, 1, 1, groups=OUTPUTS)
    reference = nn.ModuleDict({"mlp": ldp_mlp(), "conv": conv})
    table = {r"mlp\.0": "mlp/up", r"mlp\.2": "mlp/down", "conv": "around"}

    def run(x):
        x = nn.functional.adaptive_avg_pool2d(as_grid(reference["mlp"](x), 6, 5), (3, 2))
        return as_rows(x + conv(x))

    compare(LDPv2Config((3, 2)), reference, table, run, draw(2, 30, INPUTS), (6, 5))
