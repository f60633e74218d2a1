"""Error rates against hand-counted edits."""

import numpy as np
import pytest
from transformers import EvalPrediction

from variform.training.metrics import PronunciationMetrics, closest_variant, pronunciation_errors
from variform.training.tokenizer import letters_and_symbols_tokenizer


def edit_distance(source: list[str], target: list[str]) -> int:
    """The textbook recursion, row by row (Levenshtein)."""
    row = list(range(len(target) + 1))
    for i, left in enumerate(source, start=1):
        previous, row[0] = row[0], i
        for j, right in enumerate(target, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def test_a_perfect_answer_has_no_errors():
    assert pronunciation_errors(["K AE T", "D AO G"], [["K AE T"], ["D AA G", "D AO G"]]) == {"per": 0.0, "wer": 0.0}


def test_one_wrong_phoneme_of_seven_in_one_wrong_word_of_two():
    scores = pronunciation_errors(["K AE T", "D AO G IY"], [["K AE T"], ["D AO G EH"]])
    assert scores == {"per": pytest.approx(100 / 7), "wer": 50.0}


def test_the_closest_variant_is_the_reference():
    variants = [["R EH K ER D", "R AH K AO R D"]]
    assert pronunciation_errors(["R AH K AO R"], variants)["per"] == pytest.approx(100 / 6)


def test_an_empty_answer_is_all_deletions():
    assert pronunciation_errors([""], [["K AE T"]]) == {"per": 100.0, "wer": 100.0}


def test_phoneme_errors_are_the_edit_distance():
    generator = np.random.default_rng(0)
    words = [
        [" ".join(generator.choice(list("ABC"), size=generator.integers(1, 7))) for _ in range(2)] for _ in range(40)
    ]
    predictions, references = [first for first, _ in words], [second for _, second in words]
    edits = sum(edit_distance(reference.split(), prediction.split()) for prediction, reference in words)
    expected = 100 * edits / sum(len(reference.split()) for reference in references)
    assert pronunciation_errors(predictions, [[reference] for reference in references])["per"] == pytest.approx(
        expected
    )


def test_of_equally_close_variants_the_first_counts():
    assert closest_variant("A B", ["A C", "A D"]) == "A C"


@pytest.fixture
def judge():
    """PronunciationMetrics on (word, answer) pairs, padded as Trainer does it."""
    tokenizer = letters_and_symbols_tokenizer("acdgot", ["K", "AE", "T", "D", "AO", "G"])
    metrics = PronunciationMetrics(tokenizer, {"cat": ["K AE T"], "dog": ["D AO G"]})

    def scores(*pairs: tuple[str, str]) -> dict[str, float]:
        inputs = np.array([[*tokenizer(word)["input_ids"], -100] for word, _ in pairs])
        answers = np.array([[1, *tokenizer(answer)["input_ids"], -100] for _, answer in pairs])
        return metrics(EvalPrediction(predictions=answers, label_ids=None, inputs=inputs))

    return scores


def test_trainer_metrics_find_the_word_by_its_letters(judge):
    assert judge(("dog", "D AO G"), ("cat", "K AE G")) == {"per": pytest.approx(100 / 6), "wer": 50.0}


def test_a_word_that_comes_twice_counts_once(judge):
    assert judge(("dog", "D AO G"), ("cat", "K AE G"), ("cat", "K AE G"))["wer"] == 50.0
