"""Questions about images of one colour, and evaluators whose model is a function of pixels."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
from PIL import Image

from mmjax.data.questions import Question
from mmjax.evaluate import EVALUATORS
from mmjax.evaluate.lazy_images import name_of
from mmjax.evaluate.support import Entry, Seen, with_shots

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}
SIZE = 4


def image(colour, tint=0.0):
    """[1, SIZE, SIZE, 3]; tints tell images of one colour apart."""
    pixels = np.empty((1, SIZE, SIZE, 3), np.float32)
    pixels[:] = np.array(COLOURS[colour]) * (1 - tint)
    return pixels


def picture(colour):
    file = io.BytesIO()
    tone = tuple(int(127.5 * (1 + c)) for c in COLOURS[colour])
    Image.new("RGB", (24, 24), tone).save(file, "PNG")
    return file.getvalue()


def question(number, group, text, answer, images, choices=None, shown=None):
    """The prompt is the group's length in tokens, which say nothing; answers are bytes."""
    ids = np.arange(1, 4 + len(group), dtype=np.int32)
    return Question(
        id=f"q{number}",
        group=group,
        text=text,
        answers=(answer,) if isinstance(answer, str) else tuple(answer),
        choices=choices,
        ids=ids,
        place=np.where(ids == 2, 0, -1).astype(np.int32),
        images=images,
        picture=shown,
    )


def colour_questions(count=12):
    """Of each image: what colour (the image decides), and whether it is red (mostly not)."""
    names, result = list(COLOURS), []
    for i in range(count):
        colour = names[i % 3]
        pixels, shown = image(colour, tint=i / 100), picture(colour)
        for group, text, answer in (
            ("colour", f"What colour is picture {i}?", colour),
            ("yes/no", "Is it red?", "yes" if colour == "red" else "no"),
        ):
            result.append(question(len(result), group, text, answer, pixels, shown=shown))
    return result


def looks(question):
    """A model that sees: the right answer of what the image shows, "red" if it shows nothing."""
    pixels = question.images[0, 0, 0] if len(question.images) else np.zeros(3)
    colour = list(COLOURS)[int(np.argmax(pixels))]
    return (
        ("yes" if colour == "red" else "no") if "Is it" in question.text else colour.title() + "."
    )


class Given:
    """A support set of questions that are there."""

    def __init__(self, questions):
        self.questions = questions

    def __len__(self):
        return len(self.questions)

    def entry(self, row):
        return self.entry_of(self.questions[row])

    def entry_of(self, question):
        return Entry(question.id, name_of(question.images))

    def seen(self, row):
        return self.seen_of(self.questions[row])

    def seen_of(self, question):
        return Seen(name_of(question.images), question.images, lambda: question.picture)

    def prompt(self, question, rows, *, text_only, between):
        return with_shots(question, [self.questions[row] for row in rows])


def make(name, context, questions, answer=looks, **fields):
    """An evaluator whose model is `answer`, a function of a question. A data config may bring
    questions of its own."""

    class Faked(EVALUATORS[name]):
        def respond(self, params, questions):
            return [answer(question) for question in questions]

    context = SimpleNamespace(
        mesh=context.mesh,
        tokenizer=None,
        workdir=context.workdir,
        compile=lambda function: None,
        open_questions=lambda data, tokenizer, limit: iter(data.get("given", questions)[:limit]),
        open_support=lambda shots_from, data, tokenizer, pool, seed: Given(
            shots_from["given"][:pool]
        ),
    )
    return Faked(data={}, context=context, **fields)
