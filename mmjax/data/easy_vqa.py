"""easy-VQA: coloured shapes with questions, out of the package `easy-vqa` (Zhou 2020): no download.

Every picture of 64 x 64 pixels shows one shape (circle, rectangle or triangle) of one of eight
colours, and comes with about ten questions.
"""

from __future__ import annotations

from typing import Any

from mmjax.data.sources import SOURCES
from mmjax.registry import UnknownNameError, nearest

COLOURS = ("red", "green", "blue", "yellow", "brown", "teal", "gray", "black")
SHAPES = ("circle", "rectangle", "triangle")


def _group(question: str) -> str:
    if not question.startswith("what"):
        return "easy_yesno"
    return "easy_color" if "color" in question else "easy_shape"


def _caption(asked: list[tuple[str, str]]) -> str:
    """ "teal circle": what questions and answers tell; "shape" if they do not tell which."""
    said: set[str] = set()
    for question, answer in asked:
        words = set(question.rstrip("?").split())
        if answer == "yes" and not words & {"no", "not"}:
            said |= words
        elif answer not in ("yes", "no"):
            said |= words | {answer}
    known = [word for words in (COLOURS, SHAPES) for word in words if word in said]
    return " ".join(known if said & set(SHAPES) else [*known, "shape"])


@SOURCES.register("easy_vqa")
class EasyVqa:
    """The 4,000 pictures of training or the 1,000 of the test, in the order of their numbers.

    Records have `image` (encoded bytes), `id`, `questions`, a list of `question`, `answer`,
    `group` ("easy_color", "easy_shape" or "easy_yesno") and `choices` (empty: answers are open),
    and `caption`, what the answers tell of the picture: "teal circle".

    Yes-or-no questions give much away: an answer from the form of the question alone ("is no teal
    shape present?": yes) is right for four in five of them.

    Args:
      split: "train" or "test".

    Raises:
      UnknownNameError: another split.
      MissingPackageError: the package is not installed.
    """

    def __init__(self, split: str = "train"):
        try:
            import easy_vqa
        except ImportError as error:
            from mmjax.data.openmoji import MissingPackageError

            raise MissingPackageError(
                "The data source 'easy_vqa' reads the package `easy-vqa`, and it is not "
                "installed: run `pip install -e .[demo]`."
            ) from error
        readers = {
            "train": (easy_vqa.get_train_image_paths, easy_vqa.get_train_questions),
            "test": (easy_vqa.get_test_image_paths, easy_vqa.get_test_questions),
        }
        if split not in readers:
            raise UnknownNameError(f"easy_vqa has no split {split!r}; {nearest(split, readers)}")
        read_paths, read_questions = readers[split]
        paths = read_paths()
        self._split = split
        self._numbers = sorted(paths)
        self._paths = [paths[number] for number in self._numbers]
        asked: dict[int, list[tuple[str, str]]] = {number: [] for number in self._numbers}
        for question, answer, number in zip(*read_questions(), strict=True):
            asked[number].append((question, answer))
        self._asked = [asked[number] for number in self._numbers]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self._paths[index], "rb") as handle:
            image = handle.read()
        questions = [
            {"question": question, "answer": answer, "group": _group(question), "choices": []}
            for question, answer in self._asked[index]
        ]
        return {
            "image": image,
            "questions": questions,
            "caption": _caption(self._asked[index]),
            "id": self.id(index),
        }

    def id(self, index: int) -> str:
        return f"easy_vqa/{self._split}#{self._numbers[index]}"
