"""Text from language models: compiled prefill and decoding, sampling, beam search."""

from mmjax.generation.generator import Generated, Generator, generate

__all__ = ["Generated", "Generator", "generate"]
