"""Let a model continue texts, answer questions about images, or hold a conversation.

    python -m experiments.generate --weights DIR --prompt "What is the moon made of?" --chat
    python -m experiments.generate --weights DIR --image cat.png --prompt "What is it?"
    python -m experiments.generate --weights DIR --image cat.png --interactive
    python -m experiments.generate --weights model.gguf --prompt "Once upon" --temperature 0.8

DIR is a directory of Hugging Face format with weights and tokenizer, a GGUF file, or the work
directory of a run, which answers in the form that it was trained with, with or without --chat.
Each prompt is asked about all images. They stand where it has a marker <image>, or else before it:
a prompt about images without markers is a message, as with --chat, if the model has a template.
Without --temperature or --beams each token is the most probable one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments import common

if TYPE_CHECKING:
    from mmjax.evaluate.chat import Prompt, Speaker


def main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    _check(args)

    import jax
    import numpy as np

    from experiments._chat import Terminal, read_image
    from mmjax.config import dataclass_from, parse_arg
    from mmjax.evaluate.chat import open_speaker
    from mmjax.generation import Printer
    from mmjax.sharding import AXES, MeshConfig, make_mesh

    mesh = None
    if args.mesh:
        sizes = parse_arg(args.mesh, **dict.fromkeys(AXES, 1))
        mesh = make_mesh(dataclass_from(MeshConfig, sizes, "--mesh"))
    images = [read_image(file) for file in args.image]
    speaker = open_speaker(args.weights, dtype=args.dtype, mesh=mesh)
    if images and not speaker.sees:
        raise ValueError(f"{args.weights} holds a model that takes no images: leave out --image.")
    options, key = _options(args), jax.random.key(args.seed)
    if args.interactive:

        def turn(number: int) -> dict[str, Any]:
            return options | {"key": jax.random.fold_in(key, number)}

        Terminal(speaker, args.system, images, turn).run(*args.prompt)
        return 0
    prompts = [_prompt(speaker, text, images, args) for text in args.prompt]
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


def _prompt(speaker: Speaker, text: str, images: list[bytes], args: argparse.Namespace) -> Prompt:
    from mmjax.data.conversations import MARKER, Conversation, Turn

    asks = images and MARKER not in text and speaker.speech.chats
    if not (args.chat or asks):
        return speaker.speech.text(text, images)
    system = (Turn("system", (args.system,)),) if args.system else ()
    turn = speaker.turn(text, len(images))
    return speaker.speech.prompt(Conversation((*system, turn), tuple(images)))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Of `Generator.__call__`."""
    return dict(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
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
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
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
