"""Classify images by labels in words.

    python -m experiments.zero_shot --weights DIR --labels cat dog "sports car" --images a.png b.jpg

An image stands for every image in it if it is a folder. The probabilities are those of the model's
own loss: CLIP shares 100% among the labels, SigLIP judges each label alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import common
from experiments.embedder import add_arguments, open_embedder
from mmjax.config import ConfigError


def main(argv: Sequence[str] | None) -> int:
    parser = common.plain_parser(__doc__)
    add_arguments(parser, required=True)
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", nargs="+", metavar="LABEL")
    labels.add_argument("--classes", help="imagenet, cifar10, digits, or file:PATH, one a line")
    parser.add_argument("--images", nargs="+", required=True, metavar="FILE", help="or folders")
    parser.add_argument(
        "--template",
        nargs="+",
        default=["a photo of a {}."],
        help="prompts around the label, or one name: name, photo, openai_7, openai_80; the mean of "
        'several is taken; "a photo of a {}." by default',
    )
    parser.add_argument("--top", type=int, default=5, help="labels shown of each image")
    parser.add_argument("--json", action="store_true", help="one JSON object for each image")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise ConfigError(f"--top is {args.top}: expected at least 1.")

    from mmjax.evaluate.prompts import class_names, templates
    from mmjax.evaluate.zero_shot import mean_prompts

    names = class_names(args.classes or args.labels)
    named = len(args.template) == 1 and "{" not in args.template[0]
    patterns = templates(args.template[0] if named else args.template)
    files = _files(args.images)
    embedder = open_embedder(args.weights, batch_size=args.batch_size, dtype=args.dtype)
    if len(names) == 1 and not embedder.judges_alone:
        raise ConfigError("This model shares 100% among the labels: give at least two.")
    texts = [pattern.format(name) for name in names for pattern in patterns]
    classes = mean_prompts(embedder.texts(texts), len(names))
    good, broken = [], {}
    for file in files:
        try:
            good.append((file, embedder.prepare(file)))
        except (ValueError, OSError) as error:
            broken[file] = str(error)
    if good:
        images = embedder.prepared_images([prepared for _, prepared in good])
        probabilities = embedder.probabilities(images, classes)
        for (file, _), row in zip(good, probabilities, strict=True):
            _show(file, names, row.tolist(), args.top, as_json=args.json)
    for file, reason in broken.items():
        print(f"skipped {file}: {reason}", file=sys.stderr)
    return 1 if broken else 0


def _files(given: Sequence[str]) -> list[Path]:
    from mmjax.data.sources import existing
    from mmjax.search import find_images

    files: list[Path] = []
    for name in given:
        path = existing(name, "The image")
        inside = [path / entry.path for entry in find_images(path)] if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"The folder {path} holds no image.")
        files += inside
    return files


def _show(
    file: Path, names: Sequence[str], row: Sequence[float], top: int, *, as_json: bool
) -> None:
    best = sorted(zip(row, names, strict=True), key=lambda pair: -pair[0])
    if as_json:
        scores = {name: probability for probability, name in best}
        print(json.dumps({"image": str(file), "probabilities": scores}, ensure_ascii=False))
        return
    lines = [f"  {probability:7.2%}  {name}" for probability, name in best[:top]]
    print("\n".join([str(file), *lines]), flush=True)


if __name__ == "__main__":
    common.run(main)
