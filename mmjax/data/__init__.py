"""Data: sources with random access, HF-exact images, tokenizers, and the resumable loader."""

from mmjax.data import (  # noqa: F401  (they register their sources and layouts)
    anyres,
    easy_vqa,
    idefics3,
    json_source,
    mllama,
    tfds_source,
    webdataset_source,
)
from mmjax.data.image import PRESETS, CorruptImageError, denormalize, preprocess
from mmjax.data.loader import EvalLoader, Loader, open_eval, open_train
from mmjax.data.pipeline import Batch, Skipped, TooManyBadRecordsError
from mmjax.data.questions import Question, open_questions
from mmjax.data.run_tokenizer import build_tokenizer
from mmjax.data.sources import SOURCES, DataNotFoundError, open_source

__all__ = [
    "PRESETS",
    "SOURCES",
    "Batch",
    "CorruptImageError",
    "DataNotFoundError",
    "EvalLoader",
    "Loader",
    "Question",
    "Skipped",
    "TooManyBadRecordsError",
    "build_tokenizer",
    "denormalize",
    "open_eval",
    "open_questions",
    "open_source",
    "open_train",
    "preprocess",
]
