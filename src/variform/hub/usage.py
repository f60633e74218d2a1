"""Of each Auto class: its task on the Hub, a snippet that runs, and what an author should check before others use a model."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

# Every snippet reads `inputs`, which its task makes of the example, and ends by printing an answer that people can read
LOAD = """\
from transformers import {auto_class}, AutoTokenizer

path = {folder}{comment}
tokenizer = AutoTokenizer.from_pretrained(path{trust})
model = {auto_class}.from_pretrained(path{trust}).eval()
"""
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

path = {folder}{comment}
tokenizer = AutoTokenizer.from_pretrained(path)
base = {auto_class}.from_pretrained({base}{trust})
model = PeftModel.from_pretrained(base, path).eval()
"""
LOAD_ADAPTED = """\
from pathlib import Path

from transformers import AutoTokenizer
from variform.training.merging import load_adapted

path = {folder}{comment}
tokenizer = AutoTokenizer.from_pretrained(path)
model = load_adapted(Path(path)).model  # on what adapter_config.json names; finetune/merge_lora.py makes one model of both
"""


class Task(NamedTuple):
    """What an Auto class is for.

    Attributes:
        task: its identifier on the Hub; empty where a model has none, such as a body without a head.
        example: an input for people who bring none.
        code: what follows the loading; `{example}` stands for the input, and a line is left out of none.
        checks: what its answers may get wrong, for the author to look at.
    """

    task: str
    example: Any
    code: str
    checks: tuple[str, ...]


GENERATED = (
    "Which training texts come back word for word: prompt with their openings, personal data first.",
    "What is written about groups of people: swap names, genders, nationalities in a prompt and compare.",
)
LABELLED = "Whether a label changes when only a name, a gender, a dialect or a nationality in the text does."

TASKS = {
    "AutoModel": Task(
        "feature-extraction",
        "A text to read.",
        """\
inputs = tokenizer({example}, return_tensors="pt")
{decoder_inputs}states = model(**inputs).last_hidden_state
print(states.shape)  # (texts, tokens, width)""",
        (
            "Whether texts that should be near each other are, for every language, length and topic that you will feed it.",
        ),
    ),
    "AutoModelForCausalLM": Task(
        "text-generation",
        "Once upon a time",
        """\
inputs = tokenizer({example}, return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**inputs{length})
print(tokenizer.decode(answer[0], skip_special_tokens=True))""",
        (*GENERATED, "How it does on texts longer than those it was trained on."),
    ),
    "AutoModelForSeq2SeqLM": Task(
        "text2text-generation",
        "A text to rewrite.",
        """\
inputs = tokenizer({example}, return_tensors="pt", return_token_type_ids=False)
answer = model.generate(**inputs{length})
print(tokenizer.decode(answer[0], skip_special_tokens=True))""",
        (
            "Whether answers say what their source does not: compare names, numbers and negations on a sample.",
            "How it does on sources longer, shorter or of another kind than those it was trained on.",
        ),
    ),
    "AutoModelForMaskedLM": Task(
        "fill-mask",
        "Paris is the capital of France.",
        """\
inputs = tokenizer({example}, return_tensors="pt")
place = inputs.input_ids.shape[1] // 2
inputs.input_ids[0, place] = tokenizer.mask_token_id
best = model(**inputs).logits[0, place].topk(3).indices
print(tokenizer.convert_ids_to_tokens(best.tolist()))""",
        ("Which words it fills in beside names, genders and nationalities: compare the likeliest few of each.",),
    ),
    "AutoModelForSequenceClassification": Task(
        "text-classification",
        "A text to judge.",
        """\
inputs = tokenizer({example}, return_tensors="pt")
scores = model(**inputs).logits.softmax(-1)[0]
print({{model.config.id2label[place]: round(score, 3) for place, score in enumerate(scores.tolist())}})""",
        (
            LABELLED,
            "The rate of errors of each class by itself: the rarest may be hidden in the average.",
            "Whether a score of 0.9 is right in nine cases of ten: scores are not calibrated unless you did it.",
        ),
    ),
    "AutoModelForTokenClassification": Task(
        "token-classification",
        "Words to tag.",
        """\
words = {example}.split()
inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")
tags = [model.config.id2label[label] for label in model(**inputs).logits.argmax(-1)[0].tolist()]
of_words = inputs.word_ids()  # the first piece of a word has its tag
print([(word, tags[of_words.index(number)]) for number, word in enumerate(words)])""",
        (
            "The rate of errors of each tag by itself, and on words that the training never had.",
            "Whether names of some origins are found less often than others.",
        ),
    ),
    "AutoModelForQuestionAnswering": Task(
        "question-answering",
        ("Who wrote it?", "Mary wrote the letter."),
        """\
inputs = tokenizer(*{example}, return_tensors="pt")
outputs = model(**inputs)
start = outputs.start_logits[0].argmax()
end = start + outputs.end_logits[0, start:].argmax()
print(tokenizer.decode(inputs.input_ids[0, start : end + 1]))""",
        (
            "What it answers where the text has no answer: a span is always given.",
            "How it does on texts longer than those it was trained on, where the answer stands late.",
        ),
    ),
    "AutoModelForMultipleChoice": Task(
        "multiple-choice",
        ("The sky is", ["blue.", "a kind of soup."]),
        """\
start, choices = {example}
pairs = tokenizer([start] * len(choices), choices, padding=True, return_tensors="pt")
inputs = {{name: tensor[None] for name, tensor in pairs.items()}}  # (questions, choices, tokens)
print(choices[model(**inputs).logits[0].argmax()])""",
        ("Whether the order or the length of the choices decides: shuffle them and compare.",),
    ),
}


def task_of(auto_class: str) -> str:
    """The identifier on the Hub of what an Auto class is for, such as "fill-mask"."""
    return known(auto_class).task


def checks_of(auto_class: str) -> list[str]:
    """What an author should check of a model before others use it."""
    return list(known(auto_class).checks)


def known(auto_class: str) -> Task:
    """The task of an Auto class.

    Raises:
        ValueError: for one that no model of the family has.
    """
    if auto_class not in TASKS:
        raise ValueError(f"`auto_class={auto_class!r}` is not one of {sorted(TASKS)}.")
    return TASKS[auto_class]


def read_usage(folder: Path) -> dict[str, Any]:
    """What a folder tells a snippet about its model, as arguments of `usage_of`."""
    config, adapter, generation = (
        json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        for name in (CONFIG_NAME, "adapter_config.json", GENERATION_CONFIG_NAME)
    )
    told: dict[str, Any] = {"has_tokenizer": (folder / "tokenizer_config.json").is_file()}
    if generation.get("max_length") or generation.get("max_new_tokens"):
        told["knows_length"] = True
    if config:
        told |= {"remote_code": "auto_map" in config, "is_encoder_decoder": config.get("is_encoder_decoder", False)}
    elif adapter:
        told["base"] = adapter.get("base_model_name_or_path") or ""
        told["base_is_here"] = bool(told["base"]) and Path(told["base"]).exists()
    return told


def usage_of(
    auto_class: str,
    folder: str,
    example: Any = None,
    *,
    remote_code: bool = True,
    has_tokenizer: bool = True,
    is_encoder_decoder: bool = False,
    base: str = "",
    base_is_here: bool = False,
    knows_length: bool = False,
) -> str:
    """A Python snippet that loads a model and prints what it answers.

    Args:
        auto_class: the name of the Auto class.
        folder: where from: a repo on the Hub, or "." for the folder that the snippet is run in.
        example: the input: a text; a question and its context; a beginning and its choices. Default: one of ours.
        remote_code: whether the model's code comes with it.
        has_tokenizer: without one, the snippet reads the first tokens of the vocabulary.
        is_encoder_decoder: whether a decoder needs an input as well, where none is made by `generate`.
        base: of a repo that holds an adapter alone, the model that it adapts.
        knows_length: whether the model's own generation config says how long its answers may be.
        base_is_here: whether that is on this machine: the snippet leaves its path out then, and converts it where it must.

    Raises:
        ValueError: for an Auto class that no model of the family has.
    """
    task = known(auto_class)
    template = (LOAD_ADAPTED if base_is_here else LOAD_ADAPTER) if base else LOAD
    code = template.format(
        auto_class=auto_class,
        folder=json.dumps(folder),
        base=json.dumps(base),
        comment="  # this folder" if folder == "." else "",
        trust=", trust_remote_code=True" if remote_code else "",
    )
    if not has_tokenizer:
        imports = f"from transformers import {auto_class}, AutoTokenizer"
        code = code.replace(imports, f"import torch\nfrom transformers import {auto_class}")
        code = "".join(line for line in code.splitlines(keepends=True) if not line.startswith("tokenizer = "))
        return code + plain_call(auto_class, is_encoder_decoder)
    text = task.example if example is None else example
    text = tuple(text) if isinstance(text, list) else text  # as JSON keeps a pair
    decoder_inputs = 'inputs["decoder_input_ids"] = inputs.input_ids\n' if is_encoder_decoder else ""
    length = "" if knows_length else ", max_new_tokens=20"
    return code + task.code.format(example=literal(text), decoder_inputs=decoder_inputs, length=length)


def literal(value: Any) -> str:
    """Python's text for a value, strings in double quotes as our code has them."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    inner = ", ".join(map(literal, value))
    return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"


def plain_call(auto_class: str, is_encoder_decoder: bool) -> str:
    """What to do with a model that has no tokenizer."""
    shape = "1, 2, 4" if auto_class == "AutoModelForMultipleChoice" else "1, 8"
    second = ", decoder_input_ids=ids" if is_encoder_decoder else ""
    return f"ids = torch.arange(8).view({shape})\nprint(model(input_ids=ids{second})[0].shape)"
