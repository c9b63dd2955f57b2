"""Controls: the same questions without their images, or with wrong ones.

What a model answers then it has not seen. Prompts, their lengths and the places of visual tokens
stay as they are, so that nothing else differs; with tiles, their number still tells the shape of
the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmjax.data.questions import Question
from mmjax.evaluate.lazy_images import Images, name_of
from mmjax.registry import Registry

_SEED = 0

# (questions) -> what is asked instead of each; None where there is nothing to ask.
Control = Callable[[Sequence[Question]], list[Question | None]]
CONTROLS: Registry[Control] = Registry("control")


@CONTROLS.register("blind")
def blind(questions: Sequence[Question]) -> list[Question | None]:
    """Every pixel is 0 after normalisation: an even field of the preset's mean colour."""
    shapes = {question.images.shape for question in questions}
    fields = {shape: np.broadcast_to(np.float32(0), shape) for shape in shapes}
    return [question._replace(images=fields[question.images.shape]) for question in questions]


@CONTROLS.register("shuffled")
def shuffled(questions: Sequence[Question]) -> list[Question | None]:
    """Each image's questions get the next image, in a random order that is always the same.

    No image stays where it was, and each is used as often as another. Images (and sets of them) of
    one shape change places; one that is alone in its shape has nothing to be changed with.
    """
    names = image_names(questions)
    by_shape: dict[tuple[int, ...], dict[str, Images]] = {}
    for question, name in zip(questions, names, strict=True):
        by_shape.setdefault(question.images.shape, {})[name] = question.images
    following: dict[str, Images] = {}
    rng = np.random.default_rng(_SEED)
    for shape, images in by_shape.items():
        order = rng.permutation(list(images))
        if len(order) > 1 and shape[0]:
            for name, other in zip(order, np.roll(order, -1), strict=True):
                following[name] = images[other]
    return [
        question._replace(images=following[name]) if name in following else None
        for question, name in zip(questions, names, strict=True)
    ]


def image_names(questions: Sequence[Question]) -> list[str]:
    """A name of the images of each question, the same for equal pixels; its own id where there are
    no images."""
    names: dict[int, str] = {}  # questions about one image may share its array

    def name(images: Images) -> str:
        if id(images) not in names:
            names[id(images)] = name_of(images)
        return names[id(images)]

    return [name(q.images) if len(q.images) else q.id for q in questions]
