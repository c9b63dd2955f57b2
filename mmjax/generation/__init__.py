"""Text from language models: compiled prefill and decoding, sampling, beam search."""

from mmjax.generation.generator import Generated, Generator, generate
from mmjax.generation.printing import Printer

__all__ = ["Generated", "Generator", "Printer", "generate"]
