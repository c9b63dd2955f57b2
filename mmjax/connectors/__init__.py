"""Connectors: from the features of images to tokens of a language model."""

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
from mmjax.connectors.linear import LinearConfig, LinearConnector
from mmjax.connectors.mlp import MLPConfig, MLPConnector
from mmjax.connectors.pixel_shuffle import PixelShuffle, PixelShuffleConfig

__all__ = [
    "CONNECTORS",
    "Connector",
    "ConnectorConfig",
    "ConnectorError",
    "Cost",
    "Grid",
    "LinearConfig",
    "LinearConnector",
    "MLPConfig",
    "MLPConnector",
    "PixelShuffle",
    "PixelShuffleConfig",
    "cost",
    "make_connector",
]
