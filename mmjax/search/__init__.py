"""Search in folders of images by text or image."""

from mmjax.search.backends import BACKENDS, Hits
from mmjax.search.embed import Embedder, fingerprint
from mmjax.search.index import Index, SearchIndexError
from mmjax.search.opening import open_embedder
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
    "open_embedder",
    "update_index",
]
