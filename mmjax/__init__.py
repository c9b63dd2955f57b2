"""mmjax: multimodal models in JAX."""

from typing import Any

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    # Data workers import mmjax.data by the dozen; they should not pay for JAX models.
    if name == "build":
        from mmjax.factory import build

        return build
    raise AttributeError(f"module 'mmjax' has no attribute {name!r}")
