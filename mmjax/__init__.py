"""mmjax: multimodal models in JAX."""

import importlib
from typing import Any

# Data workers import mmjax.data by the dozen; they should not pay for JAX models.
_HOMES = {
    "build": "mmjax.factory",
    "from_pretrained": "mmjax.convert",
    "save_pretrained": "mmjax.convert",
    "load_processor": "mmjax.data.load_processor",
    "generate": "mmjax.generation",
    "read_run": "mmjax.train.runs",
    "open_speaker": "mmjax.evaluate.chat",
}

__all__ = [
    "build",
    "from_pretrained",
    "generate",
    "load_processor",
    "open_speaker",
    "read_run",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
