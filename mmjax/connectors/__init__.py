"""Connectors: from the features of images to tokens of a language model."""

from mmjax.connectors.align import Align, AlignConfig
from mmjax.connectors.base import (
    CONNECTORS,
    Connector,
    ConnectorConfig,
    ConnectorError,
    Cost,
    Grid,
    cost,
    make_connector,
)
from mmjax.connectors.board import Board, BoardConfig
from mmjax.connectors.c_abstractor import CAbstractor, CAbstractorConfig
from mmjax.connectors.d_abstractor import DAbstractor, DAbstractorConfig
from mmjax.connectors.frames import Frames, FramesConfig
from mmjax.connectors.idefics2 import Idefics2Config, Idefics2Connector
from mmjax.connectors.identity import IdentityConfig, IdentityConnector
from mmjax.connectors.ldp import LDP, LDPConfig, LDPv2, LDPv2Config
from mmjax.connectors.linear import LinearConfig, LinearConnector
from mmjax.connectors.mlp import MLPConfig, MLPConnector
from mmjax.connectors.perceiver import Perceiver, PerceiverConfig
from mmjax.connectors.pixel_shuffle import PixelShuffle, PixelShuffleConfig
from mmjax.connectors.pooling import PoolingConfig, PoolingConnector
from mmjax.connectors.qformer import QFormer, QFormerConfig
from mmjax.connectors.token_packer import TokenPacker, TokenPackerConfig

__all__ = [
    "CONNECTORS",
    "LDP",
    "Align",
    "AlignConfig",
    "Board",
    "BoardConfig",
    "CAbstractor",
    "CAbstractorConfig",
    "Connector",
    "ConnectorConfig",
    "ConnectorError",
    "Cost",
    "DAbstractor",
    "DAbstractorConfig",
    "Frames",
    "FramesConfig",
    "Grid",
    "Idefics2Config",
    "Idefics2Connector",
    "IdentityConfig",
    "IdentityConnector",
    "LDPConfig",
    "LDPv2",
    "LDPv2Config",
    "LinearConfig",
    "LinearConnector",
    "MLPConfig",
    "MLPConnector",
    "Perceiver",
    "PerceiverConfig",
    "PixelShuffle",
    "PixelShuffleConfig",
    "PoolingConfig",
    "PoolingConnector",
    "QFormer",
    "QFormerConfig",
    "TokenPacker",
    "TokenPackerConfig",
    "cost",
    "make_connector",
]
