"""Pairs of a better and a worse answer, made of Debian's package descriptions: no person judged them.

The prompt is the one-line description; the better answer is how the long one begins, the worse one is damaged by rule. A
model that prefers the first has learnt to prefer whole English to damaged English, not what people like.
"""

import random

from . import package_descriptions
from .base import Rows, Source
from .cloze_questions import SENTENCE

MIN_WORDS, MAX_WORDS = 8, 60


def load(config: str) -> dict[str, Rows]:
    """Rows `{"prompt", "chosen", "rejected"}`; the worse answer has the words of half of it shuffled, or said twice."""
    data = package_descriptions.read_all()
    rows = []
    for description in data.languages["en"]:
        chosen = SENTENCE.split(" ".join(description.paragraphs))[0]
        if description.short and MIN_WORDS <= len(chosen.split()) <= MAX_WORDS:
            rejected = damage(chosen)
            if rejected != chosen:
                prompt = f"{description.short}\n"  # nothing else parts it from the answer
                rows.append((description.package, {"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    return data.split(rows, "prompt")


def damage(text: str) -> str:
    """Half of the words, from a place that the text itself decides, in another order or each of them twice."""
    words, generator = text.split(), random.Random(text)
    begin = generator.randrange(len(words) // 2 + 1)
    part = words[begin : begin + len(words) // 2]
    is_shuffled = generator.random() < 0.5
    worse = generator.sample(part, len(part)) if is_shuffled else [word for word in part for _ in range(2)]
    return " ".join([*words[:begin], *worse, *words[begin + len(part) :]])


SOURCE = Source(
    configs={"damaged": ("prompt", "chosen", "rejected")},
    load=load,
    files=package_descriptions.files,
    split=package_descriptions.SPLIT,
    licence=package_descriptions.LICENCE,
    citation=f"{package_descriptions.CITATION}; the worse answers are made by rule",
    homepage=package_descriptions.HOMEPAGE,
)
