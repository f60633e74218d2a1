"""Questions with their answer in a paragraph, made of Debian's package descriptions: no person asked them.

As in the CNN/Daily Mail questions (Hermann et al., arXiv:1506.03340), a sentence with a name or number taken out is the
question, and the rest of the description, which has that name or number too, is the paragraph. Models that do well here have
learnt to point at text; that they answer people's questions is not shown by it.
"""

import re

from . import package_descriptions
from .base import Rows, Source

SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
NAME = re.compile(r"(?<![\w.-])(?:[A-Z][\w+-]*\w|\d[\d.]*\d|\d)(?![\w-])")
BLANK = "_____"
MIN_CONTEXT_WORDS = 15
MOST_CHARACTERS = 200  # of a question; longer ones are lists


def load(config: str) -> dict[str, Rows]:
    """Rows `{"question", "context", "answers"}`, the answers being every place of the name, as in SQuAD; one a description."""
    data = package_descriptions.read_all()
    rows = [
        (description.package, row)
        for description in data.languages["en"]
        if (row := make_question(" ".join(description.paragraphs)))
    ]
    return data.split(rows, "context")


def make_question(text: str) -> dict | None:
    """The last sentence that is no list and of which a name, not its first word, stands in the others; None without one."""
    sentences = SENTENCE.split(text)
    for number in reversed(range(len(sentences))):
        context = " ".join(sentences[:number] + sentences[number + 1 :])
        if len(context.split()) < MIN_CONTEXT_WORDS or len(sentences[number]) > MOST_CHARACTERS:
            continue
        for name in NAME.finditer(sentences[number]):
            places = [found.start() for found in NAME.finditer(context) if found[0] == name[0]]
            if name.start() and places:
                question = sentences[number][: name.start()] + BLANK + sentences[number][name.end() :]
                return {
                    "question": question,
                    "context": context,
                    "answers": {"text": [name[0]] * len(places), "answer_start": places},
                }
    return None


SOURCE = Source(
    configs={"descriptions": ("question", "context", "answers")},
    load=load,
    files=package_descriptions.files,
    split=package_descriptions.SPLIT,
    licence=package_descriptions.LICENCE,
    citation=f"{package_descriptions.CITATION}; questions made by rule as in Hermann et al. 2015, arXiv:1506.03340",
    homepage=package_descriptions.HOMEPAGE,
)
