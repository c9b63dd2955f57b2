"""Search in folders of images by text or image."""

from mmjax.search.backends import BACKENDS, Hits
from mmjax.search.embed import Embedder, fingerprint
from mmjax.search.index import Index, SearchIndexError
from mmjax.search.update import Update, find_images, update_index

__all__ = [
    "BACKENDS",
    "Embedder",
    "Hits",
    "Index",
    "SearchIndexError",
    "Update",
    "find_images",
    "fingerprint",
    "update_index",
]
