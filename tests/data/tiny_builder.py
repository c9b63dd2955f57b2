"""A TFDS builder as a user would write one."""

import io

import numpy as np
import tensorflow_datasets as tfds
from samples import encode, picture


class TinyPictures(tfds.core.GeneratorBasedBuilder):
    """Six pictures."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "text": tfds.features.Text(),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "by": np.int32}),
            "label": tfds.features.ClassLabel(names=["even", "odd"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(6):
            image = io.BytesIO(encode(picture(i), "PNG"))
            captions = [{"text": f"{word} {i}", "by": i} for word in ("first", "second")]
            yield (
                i,
                {
                    "image": image,
                    "text": f"picture {i}",
                    "captions": captions,
                    "label": i % 2,
                },
            )
