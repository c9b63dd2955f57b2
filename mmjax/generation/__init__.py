"""Text and pictures from language models: compiled prefill and decoding, sampling, beam search."""

from mmjax.generation.generator import Generated, Generator, generate
from mmjax.generation.pictures import Painter, contact_sheet
from mmjax.generation.printing import Printer
from mmjax.generation.streams import Part, split, text_only

__all__ = [
    "Generated",
    "Generator",
    "Painter",
    "Part",
    "Printer",
    "contact_sheet",
    "generate",
    "split",
    "text_only",
]
