"""Let a model continue texts, answer questions about images, hold a conversation, or draw.

    python -m experiments.generate --weights DIR --prompt "What is the moon made of?" --chat
    python -m experiments.generate --weights DIR --image cat.png --prompt "What is it?"
    python -m experiments.generate --weights DIR --image cat.png --interactive
    python -m experiments.generate --weights model.gguf --prompt "Once upon" --temperature 0.8
    python -m experiments.generate --weights DIR --prompt "red heart" --draw heart.png --guidance 3

DIR is a directory of Hugging Face format with weights and tokenizer, a GGUF file, or the work
directory of a run, which answers in the form that it was trained with, with or without --chat.
Each prompt is asked about all images. They stand where it has a marker <image>, or else before it:
a prompt about images without markers is a message, as with --chat, if the model has a template.
Without --temperature or --beams each token is the most probable one.

With --draw a unified model draws --count pictures of each prompt; several become one picture, a row
for each prompt. They are drawn with --temperature 1 if nothing else is said. --guidance says how
much the prompt counts, of pictures and of texts, beside what is written of --negative.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments import common

if TYPE_CHECKING:
    from pathlib import Path

    from jax.sharding import Mesh

    from mmjax.evaluate.chat import Prompt, Speaker


def main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    _check(args)

    import jax
    import numpy as np

    from experiments._chat import Terminal, read_image
    from experiments._draw import check_target
    from mmjax.config import dataclass_from, parse_arg
    from mmjax.evaluate.chat import open_speaker
    from mmjax.generation import Printer, text_only
    from mmjax.models import UnifiedConfig
    from mmjax.sharding import AXES, MeshConfig, make_mesh

    target = None if args.draw is None else check_target(args.draw, overwrite=args.overwrite)
    mesh = None
    if args.mesh:
        sizes = parse_arg(args.mesh, **dict.fromkeys(AXES, 1))
        mesh = make_mesh(dataclass_from(MeshConfig, sizes, "--mesh"))
    images = [read_image(file) for file in args.image]
    speaker = open_speaker(args.weights, dtype=args.dtype, mesh=mesh)
    if images and not speaker.sees:
        raise ValueError(f"{args.weights} holds a model that takes no images: leave out --image.")
    if target is not None:
        _draw(speaker, images, args, target, mesh)
        return 0
    options, key = _options(args), jax.random.key(args.seed)
    if isinstance(speaker.model.config, UnifiedConfig):
        # Words, and some: a stream may end where an image does.
        options |= {"suppress": text_only(speaker.model.config), "min_new_tokens": 1}
    if args.interactive:

        def turn(number: int) -> dict[str, Any]:
            return options | {"key": jax.random.fold_in(key, number)}

        Terminal(speaker, args.system, images, turn).run(*args.prompt)
        return 0
    prompts = [_prompt(speaker, text, images, args) for text in args.prompt]
    if args.guidance is not None:
        options["negative"] = [_prompt(speaker, args.negative, [], args).ids]
    printer = Printer(speaker.speech.decode) if args.stream else None
    began = time.perf_counter()
    result = speaker(prompts, **options, key=key, stream=printer)
    seconds = time.perf_counter() - began
    if printer is not None:
        printer.finish()
    else:
        for text in speaker.texts(result):
            print(text)
    count = int(np.sum(result.lengths))
    print(f"{count} tokens in {seconds:.1f} s, compilation included.", file=sys.stderr, flush=True)
    return 0


def _draw(
    speaker: Speaker,
    images: list[bytes],
    args: argparse.Namespace,
    target: Path,
    mesh: Mesh | None,
) -> None:
    """Writes what the prompts ask for."""
    import jax

    from experiments._draw import draw, drawing_speaker, picture_of

    speaker = drawing_speaker(speaker, mesh)
    pictures = draw(
        speaker,
        [_prompt(speaker, text, images, args) for text in args.prompt],
        args.count,
        negative=None if args.guidance is None else _prompt(speaker, args.negative, [], args),
        key=jax.random.key(args.seed),
        mesh=mesh,
        **_choice(args),
    )
    picture_of(args.prompt, pictures).save(target)
    print(target, flush=True)


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError on arguments that contradict each other."""
    if not args.prompt and not args.interactive:
        raise ValueError("Give a --prompt, or --interactive for a conversation.")
    if args.stream and len(args.prompt) > 1:
        raise ValueError("--stream writes one text as it comes: give one --prompt.")
    if args.system and not (args.chat or args.interactive):
        raise ValueError("--system is part of a conversation: give --chat or --interactive too.")
    if args.interactive and len(args.prompt) > 1:
        raise ValueError("--interactive begins with one --prompt, or none; the rest is typed.")
    if args.interactive and args.beams > 1:
        raise ValueError("--interactive writes as the text comes, and beams end all at once.")
    if args.interactive and args.guidance is not None:
        raise ValueError("--guidance compares with one --negative prompt: it has no conversation.")
    if args.negative and args.guidance is None:
        raise ValueError("--negative counts by --guidance only: give it, such as 3.")
    texts = args.interactive or args.stream or args.stop or args.beams > 1
    if args.draw is not None and texts:
        raise ValueError("--draw goes with no --interactive, --stream, --stop or --beams.")
    if args.draw is None and (args.overwrite or args.count != 1):
        raise ValueError("--count and --overwrite are about pictures: give --draw too.")
    if args.count < 1:
        raise ValueError(f"--count={args.count} must be at least 1.")
    if args.count > 1 and args.temperature == 0:
        raise ValueError("--temperature 0 draws the same picture --count times: leave it out.")


def _prompt(speaker: Speaker, text: str, images: list[bytes], args: argparse.Namespace) -> Prompt:
    from mmjax.data.conversations import MARKER, Conversation, Turn

    asks = images and MARKER not in text and speaker.speech.chats
    if not (args.chat or asks):
        return speaker.speech.text(text, images)
    system = (Turn("system", (args.system,)),) if args.system else ()
    turn = speaker.turn(text, len(images))
    return speaker.speech.prompt(Conversation((*system, turn), tuple(images)))


def _choice(args: argparse.Namespace) -> dict[str, Any]:
    """Of `Generator.__call__`, what decides about tokens."""
    usual = 0.0 if args.draw is None else 1.0
    return dict(
        temperature=usual if args.temperature is None else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        guidance=args.guidance,
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `Generator.__call__`, for texts."""
    return _choice(args) | dict(
        max_new_tokens=args.max_new_tokens,
        num_beams=args.beams,
        length_penalty=args.length_penalty,
        stop_strings=args.stop,
    )


def _parser() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--weights", required=True, help="a directory, or a GGUF file")
    parser.add_argument(
        "--prompt", default=[], action="append", help="several times for several texts"
    )
    parser.add_argument(
        "--image", default=[], action="append", help="a picture; several times for several"
    )
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message: use the chat template"
    )
    parser.add_argument("--interactive", action="store_true", help="a conversation on the terminal")
    parser.add_argument("--system", default="", help="what a conversation begins with")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of texts")
    parser.add_argument("--temperature", type=float, help="0 by default, with --draw 1")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--guidance", type=float, help="how much prompts count, such as 3")
    parser.add_argument("--negative", default="", help="a text that --guidance leads away from")
    parser.add_argument("--draw", metavar="FILE.png", help="draw, and write the picture here")
    parser.add_argument("--count", type=int, default=1, help="of pictures of each prompt")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.png if it exists")
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of beam search")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends a text")
    parser.add_argument("--stream", action="store_true", help="write the text as it comes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the computation: float32 by default, of a run that of its config",
    )
    parser.add_argument("--mesh", help="sizes such as data=2,tensor=4; one device by default")
    return parser


if __name__ == "__main__":
    common.run(main)
