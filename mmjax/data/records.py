"""What may be wrong with data, and how a field of a record is found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmjax.registry import UnknownNameError, nearest


class DataNotFoundError(ValueError):
    """The named data set, file or directory is not there, or has nothing in it."""


class BadRecordError(ValueError):
    """A record that cannot be used: a missing file, no image in its bytes, no caption."""


def get_field(record: Mapping[str, Any], field: str, record_id: str) -> Any:
    """record[field], where "captions.text" is record["captions"]["text"].

    Raises:
      UnknownNameError: no such field; names the nearest.
    """
    value: Any = record
    for part in [field] if field in record else field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = value if isinstance(value, Mapping) else ()
            raise UnknownNameError(f"{record_id} has no field {field!r}; {nearest(part, known)}")
        value = value[part]
    return value
