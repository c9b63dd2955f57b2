"""How near captions are to reference captions: BLEU, METEOR, ROUGE-L, CIDEr, without Java.

What can be had is taken from libraries (the extra `captions`). As in COCO's evaluation
(github.com/tylin/coco-caption), captions are split into lower-case words by the rules of the Penn
Treebank, without punctuation; the splitting is NLTK's, not Stanford's. What differs from COCO's
figures is said of each score.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# What COCO's evaluation drops (its list of the tokenizer's names for it).
_PUNCTUATION = {"''", "'", "``", "`", '"', "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--",
                "...", ";"}  # fmt: skip
_ORDER = 4
_REMEMBERED = 100_000

Words = list[str]


class CaptionScores:
    """Scores captions of the images whose references are given.

    - BLEU-1 to BLEU-4 (Papineni et al. 2002), of the whole corpus, the closest reference's length,
      no smoothing; n-grams counted by sacrebleu. COCO's, but for its 1e-15 in the place of 0.
    - METEOR (Lavie and Agarwal 2007), by NLTK: exact matches, then those of Porter stems; alpha
      0.9, beta 3, gamma 0.5; the best reference. No synonyms, for WordNet is a download. COCO's is
      METEOR 1.5, with synonyms and paraphrases, and another number altogether.
    - ROUGE_L (Lin 2004): the longest common subsequence by rouge-score; COCO's combination: the
      best precision and the best recall among the references, beta = 1.2.
    - CIDEr: CIDEr-D, as COCO's; see `Cider`.

    Args:
      references: of each image, at least one.

    Raises:
      ImportError: if the libraries are not installed.
      ValueError: if an image has no reference.
    """

    names = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr")

    def __init__(self, references: Sequence[Sequence[str]]):
        self._libraries = _Libraries()
        if not all(references):
            raise ValueError("An image has no reference caption to compare with.")
        self._cider = Cider([[self._libraries.words(r) for r in each] for each in references])

    def count(self, caption: str, references: Sequence[str]) -> list[float]:
        """What `of` makes scores of, once it is added up."""
        libraries = self._libraries
        said = libraries.words(caption)
        right = [libraries.words(reference) for reference in references]
        return [
            *libraries.matches(said, right),
            libraries.meteor(said, right),
            libraries.rouge_l(said, right),
            self._cider(said, right),
        ]

    @classmethod
    def of(cls, sums: np.ndarray, captions: np.ndarray) -> dict[str, np.ndarray]:
        """Scores by name, of sums [..., S] over so many captions [...]."""
        matched, there, lengths = sums[..., :4], sums[..., 4:8], sums[..., 8:10]
        # log(0): no n-gram matched, and BLEU is 0.
        precision = np.cumsum(np.log(matched) - np.log(there), axis=-1) / np.arange(1, 1 + _ORDER)
        brevity = np.minimum(1 - lengths[..., 1] / lengths[..., 0], 0)
        bleu = np.where(matched == 0, 0.0, np.exp(brevity[..., None] + precision))
        bleu = np.where(captions[..., None] == 0, np.nan, bleu)
        means = sums[..., 10:] / captions[..., None]
        scores = np.concatenate([bleu, means], axis=-1)
        return dict(zip(cls.names, np.moveaxis(scores, -1, 0), strict=True))


class _Libraries:
    """What comes from libraries, each of which takes long to import."""

    def __init__(self):
        try:
            from nltk.stem.porter import PorterStemmer
            from nltk.tokenize import TreebankWordTokenizer
            from nltk.translate.meteor_score import meteor_score
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import BLEU
        except ImportError as error:
            raise ImportError(
                f"Scores of captions need {error.name}: pip install -e '.[captions]'."
            ) from None
        self._tokenizer = TreebankWordTokenizer()
        self._meteor_score = meteor_score
        # References and common words come again and again.
        self.words = functools.lru_cache(_REMEMBERED)(self._words)
        self.stem = functools.lru_cache(_REMEMBERED)(PorterStemmer().stem)
        self._rouge = RougeScorer(["rougeL"], tokenizer=_Spaces())
        self._bleu = BLEU(tokenize="none", effective_order=True, max_ngram_order=_ORDER)

    def _words(self, caption: str) -> Words:
        return [w for w in self._tokenizer.tokenize(caption.lower()) if w not in _PUNCTUATION]

    def matches(self, said: Words, right: Sequence[Words]) -> list[float]:
        """Of 1-grams to 4-grams, how many match and how many there are; the caption's length, and
        that of the reference closest to it."""
        score = self._bleu.sentence_score(" ".join(said), [" ".join(words) for words in right])
        return [*score.counts, *score.totals, score.sys_len, score.ref_len]

    def meteor(self, said: Words, right: Sequence[Words]) -> float:
        return self._meteor_score(right, said, stemmer=self, wordnet=_NoSynonyms())

    def rouge_l(self, said: Words, right: Sequence[Words]) -> float:
        scores = [self._rouge.score(" ".join(r), " ".join(said))["rougeL"] for r in right]
        precision = max(score.precision for score in scores)
        recall = max(score.recall for score in scores)
        if not precision or not recall:
            return 0.0
        square = 1.2**2
        return (1 + square) * precision * recall / (recall + square * precision)


class _Spaces:
    """A tokenizer of rouge-score for text that is split already."""

    def tokenize(self, text: str) -> Words:
        return text.split()


class _NoSynonyms:
    """A WordNet without a word."""

    def synsets(self, word: str) -> tuple[Any, ...]:
        del word
        return ()


class Cider:
    """CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726, section 6), from 0 to 10.

    The mean over n = 1 to 4 and over the references of: the cosine of the n-gram counts, weighted
    by how few images have the n-gram, those of the caption clipped to those of the reference; times
    a Gaussian of the difference of the lengths, sigma 6; times 10. As in COCO's evaluation, lengths
    are counted in 2-grams. Written here because the only library that has it comes with 100 MB of
    Java.

    Args:
      references: of each image, in words. Scores depend on all of them.
    """

    _SIGMA = 6.0

    def __init__(self, references: Sequence[Sequence[Words]]):
        self._images = collections.Counter()
        for each in references:
            self._images.update({gram for words in each for gram in _grams(words)})
        self._log_total = math.log(len(references))

    def __call__(self, said: Words, references: Sequence[Words]) -> float:
        """The score of a caption, given its image's references."""
        caption = self._vectors(said)
        total = sum(self._similarity(caption, self._vectors(words)) for words in references)
        return 10 * total / len(references)

    def _vectors(self, words: Words) -> tuple[list[dict[tuple[str, ...], float]], int]:
        """Weighted counts of the n-grams of each n, and the length."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDER)]
        for gram, count in _grams(words).items():
            rarity = self._log_total - math.log(max(self._images[gram], 1))
            vectors[len(gram) - 1][gram] = count * rarity
        return vectors, max(len(words) - 1, 0)

    def _similarity(self, caption: Any, reference: Any) -> float:
        (said, said_length), (right, right_length) = caption, reference
        total = 0.0
        for a, b in zip(said, right, strict=True):
            dot = sum(min(value, b.get(gram, 0.0)) * b.get(gram, 0.0) for gram, value in a.items())
            norms = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
            total += dot / norms if norms else 0.0
        difference = said_length - right_length
        return total / _ORDER * math.exp(-(difference**2) / (2 * self._SIGMA**2))


def _grams(words: Words) -> collections.Counter:
    """How often each sequence of 1 to 4 words is there."""
    return collections.Counter(
        tuple(words[start : start + n])
        for n in range(1, 1 + _ORDER)
        for start in range(len(words) - n + 1)
    )
