"""What a short answer says, and how far it is the right one, as the official scripts decide.

VQA: Antol et al. 2015 (arXiv:1505.00468), Goyal et al. 2017 (arXiv:1612.00837); the reference is
`vqaEval.py` of github.com/GT-Vision-Lab/VQA. POPE: Li et al. 2023 (arXiv:2305.10355); the reference
is `evaluate.py` of github.com/RUCAIBox/POPE.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

# Three of the others must say the same for full marks.
_AGREEING = 3

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}

# Where one apostrophe is missing it is put back. The official table has those of "I" too, but in
# capitals, which it never meets.
_CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[: mark.start()] + word[mark.end() :]: word
    for word in _CONTRACTED.split()
    for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """An answer as the VQA evaluation compares it.

    Lower case; no articles; numbers up to ten as digits; apostrophes where they belong; punctuation
    gone, or a space where it stood between words.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    digits_grouped = re.search(r"\d,\d", answer)
    text = answer
    for mark in _PUNCTUATION:
        at_edge = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if at_edge or digits_grouped else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, right: Sequence[str]) -> float:
    """VQA accuracy: each annotator is left out in turn, and `answer` counts as min(n / 3, 1) where
    n of the others gave it; the mean of that.

    Fewer than four right answers are not annotators (their agreement could not reach full marks)
    but alternatives: any of them counts 1. All answers are normalised; the official script leaves
    that out where all annotators agree to the letter.
    """
    answer, right = normalise(answer), [normalise(other) for other in right]
    same = right.count(answer)
    if len(right) <= _AGREEING:
        return float(same > 0)
    # `same` of the annotators see one agreeing answer less.
    left_out = same * min((same - 1) / _AGREEING, 1)
    others = (len(right) - same) * min(same / _AGREEING, 1)
    return (left_out + others) / len(right)


def exact_match(answer: str, right: Sequence[str]) -> bool:
    """Whether it is one of the right answers, but for case and the spaces around it."""
    return answer.strip().lower() in {other.strip().lower() for other in right}


def same_words(answer: str, right: Sequence[str]) -> bool:
    """Whether it is one of the right answers, but for case and all spaces: a tokenizer that splits
    words at punctuation does not tell where they were."""
    return _packed(answer) in {_packed(other) for other in right}


def _packed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).lower().split())


def says_yes(answer: str) -> bool:
    """POPE's reading: no if the first sentence has the word "no" or "not", yes otherwise."""
    words = answer.split(".")[0].replace(",", "").lower().split()
    return not {"no", "not"} & set(words)
