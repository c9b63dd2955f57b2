"""How well pictures fit the texts that they were drawn of, by the vectors of an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mmjax.evaluate.captioning import CLIP_WEIGHT
from mmjax.evaluate.intervals import percentiles, resampled, wilson
from mmjax.evaluate.metrics import label_ranks


def drawing_scores(
    cosines: Mapping[str, np.ndarray],
    right: Sequence[int],
    shuffled: int,
) -> dict[str, float]:
    """Scores by name, `guidance_3/CLIPScore` for instance; each has a 95% interval, `..._low` to
    `..._high`, over the pictures.

    Args:
      cosines: of pictures and texts, [N, T], by how the pictures were made. No text is twice among
        the T; picture i is of the same text however it was made.
      right: [N], which text each picture is of.
      shuffled: so many of the texts, the first ones, are those of pictures: at least two.

    Returns:
      cosine, CLIPScore: means. shuffled/cosine, shuffled/CLIPScore: of the same pictures with each
      of the other texts, the mean over all ways to shuffle. gain: CLIPScore - shuffled/CLIPScore,
      drawn together. R@1: the share of pictures whose text is nearer than all others.
    """
    found: dict[str, float] = {}
    rows, right = np.arange(len(right)), np.asarray(right)
    for made, each in cosines.items():
        columns: dict[str, np.ndarray] = {}
        for name, values in (("cosine", each), ("CLIPScore", CLIP_WEIGHT * np.maximum(each, 0))):
            own = values[rows, right]
            columns[name] = own
            others = values[:, :shuffled].sum(axis=1) - own
            columns[f"shuffled/{name}"] = others / (shuffled - 1)
        columns["gain"] = columns["CLIPScore"] - columns["shuffled/CLIPScore"]
        columns["R@1"] = label_ranks(each, right) == 1
        table = np.stack(list(columns.values()), axis=1).astype(np.float64)
        low, high = percentiles(resampled(table) / len(table))
        for name, *numbers in zip(columns, table.mean(axis=0), low, high, strict=True):
            value, least, most = map(float, numbers)
            if name == "R@1":  # no error among few pictures proves little
                ends = wilson(np.float64(value), np.float64(len(table)))
                least, most = min(least, float(ends[0])), max(most, float(ends[1]))
            found |= {f"{made}/{name}": value}
            found |= {f"{made}/{name}_low": least, f"{made}/{name}_high": most}
    return found
