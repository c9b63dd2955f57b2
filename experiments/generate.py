"""Let a language model continue prompts.

    python -m experiments.generate --weights DIR --prompt "What is the moon made of?" --chat
    python -m experiments.generate --weights model.gguf --prompt "Once upon" --temperature 0.8

DIR is a directory of Hugging Face format with weights and tokenizer, or a GGUF file. Without
--temperature or --beams each token is the most probable one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import common


def main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    if args.stream and len(args.prompt) > 1:
        raise ValueError("--stream writes one text as it comes: give one --prompt.")

    import jax
    import numpy as np

    import mmjax
    from mmjax.config import dataclass_from, parse_arg
    from mmjax.data.processor import check_vocabulary
    from mmjax.generation import Generator
    from mmjax.sharding import AXES, MeshConfig, make_mesh

    mesh = None
    if args.mesh:
        sizes = parse_arg(args.mesh, **dict.fromkeys(AXES, 1))
        mesh = make_mesh(dataclass_from(MeshConfig, sizes, "--mesh"))
    model = mmjax.from_pretrained(args.weights, dtype=args.dtype, mesh=mesh)
    if not hasattr(model, "encoder_decoder"):
        raise ValueError(
            f"{args.weights} holds a model that writes no text: {type(model).__name__}."
        )
    if args.image:
        raise ValueError(
            f"{args.weights} holds a model that takes no images ({type(model).__name__}): leave "
            "out --image."
        )
    tokenizer = open_tokenizer(args.weights)
    check_vocabulary(tokenizer, model.config.vocab_size)
    prompts = [encode(tokenizer, prompt, chat=args.chat) for prompt in args.prompt]

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    printer = Printer(decode) if args.stream else None
    generator = Generator(model, mesh=mesh)
    began = time.perf_counter()
    result = generator(
        prompts,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        num_beams=args.beams,
        length_penalty=args.length_penalty,
        eos_id=end_tokens(args.weights, model, tokenizer),
        stop_strings=args.stop,
        decode=decode,
        key=jax.random.key(args.seed),
        stream=printer,
    )
    seconds = time.perf_counter() - began
    if printer is not None:
        printer.finish()
    else:
        for row, length in zip(result.tokens, result.lengths, strict=True):
            print(decode(row[:length].tolist()))
    count = int(np.sum(result.lengths))
    print(f"{count} tokens in {seconds:.1f} s, compilation included.", file=sys.stderr, flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--weights", required=True, help="a directory, or a GGUF file")
    parser.add_argument(
        "--prompt", required=True, action="append", help="several times for several texts"
    )
    parser.add_argument("--image", help="a picture, for models that see")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message: use the chat template"
    )
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
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--mesh", help="sizes such as data=2,tensor=4; one device by default")
    return parser


def open_tokenizer(weights: str) -> Any:
    """The tokenizer (of transformers) that belongs to the weights.

    Raises:
      ValueError: if there is none.
    """
    if Path(weights).is_file():
        from mmjax.convert.gguf_tokenizer import read_tokenizer

        return read_tokenizer(weights)
    import mmjax

    tokenizer = mmjax.load_processor(weights).tokenizer
    if tokenizer is None:
        raise ValueError(f"{weights} holds no tokenizer, so that it can read no prompt.")
    return tokenizer


def encode(tokenizer: Any, prompt: str, *, chat: bool) -> list[int]:
    """The ids of a prompt, or of a conversation that begins with it.

    Raises:
      ValueError: if a chat is wanted of a tokenizer without a template.
    """
    if not chat:
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError("--chat: the tokenizer has no chat template. Leave it out.")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def end_tokens(weights: str, model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: of the generation config, else of the config or tokenizer."""
    settings = Path(weights) / "generation_config.json"
    said = json.loads(settings.read_text()).get("eos_token_id") if settings.exists() else None
    if said is None:
        said = json.loads(model.origin.config).get("eos_token_id")
    if said is None:
        said = tokenizer.eos_token_id
    return [] if said is None else said if isinstance(said, list) else [said]


class Printer:
    """Writes a text as its tokens come, whole characters at a time."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self.decode = decode
        self.ids: list[int] = []
        self.written = 0

    def __call__(self, rows: list[list[int]]) -> None:
        self.ids += rows[0]
        text = self.decode(self.ids)
        # A character of several tokens is this one until it is whole.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def finish(self) -> None:
        self._write(self.decode(self.ids) + "\n")

    def _write(self, text: str) -> None:
        print(text[self.written :], end="", flush=True)
        self.written = len(text)


if __name__ == "__main__":
    common.run(main)
