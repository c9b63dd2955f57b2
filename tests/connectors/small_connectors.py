"""A small config of every connector. One without an entry fails the tests that go over all."""

from mmjax.connectors import (
    AlignConfig,
    BoardConfig,
    CAbstractorConfig,
    DAbstractorConfig,
    FramesConfig,
    Idefics2Config,
    IdentityConfig,
    LDPConfig,
    LDPv2Config,
    LinearConfig,
    MLPConfig,
    PerceiverConfig,
    PixelShuffleConfig,
    PoolingConfig,
    QFormerConfig,
    TokenPackerConfig,
)

CONFIGS = (
    AlignConfig(vocab_size=16),
    BoardConfig(1, 2, PixelShuffleConfig(2)),
    CAbstractorConfig((2, 2), width=16, depth=1, positions=(4, 4)),
    DAbstractorConfig((2, 2), width=16, depth=2, heads=2, mlp_width=16, points=2, positions=(4, 4)),
    FramesConfig(2, PixelShuffleConfig(2)),
    Idefics2Config(latents=4, depth=2, heads=4, kv_heads=2, head_dim=8, hidden=16, mlp_ratio=2),
    IdentityConfig(),
    LDPConfig(),
    LDPv2Config((2, 2)),
    LinearConfig(),
    MLPConfig(),
    PerceiverConfig(latents=4, depth=2, heads=2, head_dim=8, mlp_ratio=2, frames=2),
    PixelShuffleConfig(2),
    PoolingConfig((2, 2)),
    QFormerConfig(queries=4, width=16, depth=2, heads=2, mlp_width=16),
    TokenPackerConfig(2, width=16, heads=2),
)
SMALL = {config.name: config for config in CONFIGS}
