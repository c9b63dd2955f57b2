"""mmjax: multimodal models in JAX."""

from mmjax.build import build

__all__ = ["build"]
