"""Error rates against hand-counted edits."""

import sys

import evaluate
import numpy as np
import pytest

from variform.training.evaluation.metrics import (
    METRICS,
    closest_variant,
    load_metric,
    pronunciation_errors,
)


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


class TestLibraries:
    """Each metric against figures counted by hand."""

    def test_accuracy_and_f1(self):
        answers = {"predictions": [0, 1, 1, 2], "references": [0, 1, 0, 0]}
        assert load_metric("accuracy").compute(**answers) == {"accuracy": 0.5}
        # Class 0: precision 1, recall 1/3; class 1: precision 1/2, recall 1; class 2 does not occur
        assert load_metric("f1").compute(**answers) == {"f1": pytest.approx((1 / 2 + 2 / 3 + 0) / 3)}
        assert load_metric("f1").compute(**answers, average="micro") == {"f1": 0.5}

    def test_bleu(self):
        # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples and 1 of 3 quadruples; as long as the reference
        scores = load_metric("bleu").compute(
            predictions=["the cat sat on a mat"], references=["the cat sat on the mat"]
        )
        assert scores["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
        assert "tok:13a" in scores["bleu_signature"]

    def test_bleu_of_several_references_takes_the_words_of_all(self):
        scores = load_metric("bleu").compute(
            predictions=["one two three four five"], references=[["one two three four", "two three four five"]]
        )
        assert scores["bleu"] == pytest.approx(100)  # neither has all of the words, both together do
        with pytest.raises(ValueError, match="as many for each"):
            load_metric("bleu").compute(predictions=["a", "b"], references=[["a"], ["b", "c"]])

    def test_chrf(self):
        # n-grams of "abcd" without spaces shared with "abce", for n = 1 to 4: 3/4, 2/3, 1/2, 0/1; longer ones do not count
        scores = load_metric("chrf").compute(predictions=["abcd"], references=["abce"])
        assert scores["chrf"] == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)

    def test_rouge(self):
        scores = load_metric("rouge").compute(predictions=["the cat sat"], references=["the cat was here"])
        assert scores["rouge1"] == pytest.approx(100 * 2 * 2 / (3 + 4))
        assert scores["rouge2"] == pytest.approx(100 * 2 * 1 / (2 + 3))
        assert scores["rougeL"] == pytest.approx(100 * 2 * 2 / (3 + 4))

    def test_word_and_character_errors(self):
        texts = {"predictions": ["a cat sits", "yes"], "references": ["the cat sits down", "yes"]}
        assert load_metric("wer").compute(**texts) == {"wer": pytest.approx(100 * 2 / 5)}
        assert load_metric("cer").compute(predictions=["abc"], references=["abdc"]) == {"cer": 25.0}

    def test_spans_count_whole(self):
        scores = load_metric("seqeval").compute(
            predictions=[["B-PER", "I-PER", "O", "B-LOC"]], references=[["B-PER", "O", "O", "B-LOC"]]
        )
        assert scores == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "accuracy": 0.75}

    def test_answers(self):
        scores = load_metric("squad").compute(
            predictions=["The Eiffel Tower!", "in Paris today", ""],
            references=[["eiffel tower"], ["Paris", "London"], []],
        )
        assert scores["exact_match"] == pytest.approx(100 * 2 / 3)
        assert scores["f1"] == pytest.approx(100 * (1 + 2 / (3 + 1) + 1) / 3)

    def test_perplexity_is_that_of_the_corpus(self):
        # One token of probability 1/2 and three of 1/4: 7 bits for 4 tokens, which are 7 bytes
        nats = [np.log(2), 3 * np.log(4)]
        scores = load_metric("perplexity").compute(predictions=nats, references=[1, 3], bytes=7)
        assert scores == {"perplexity": pytest.approx(2 ** (7 / 4)), "tokens": 4, "bits_per_byte": pytest.approx(1.0)}

    def test_pronunciations(self):
        scores = load_metric("pronunciation").compute(predictions=["D AO G"], references=[["D AA G", "D AO G"]])
        assert scores == {"per": 0.0, "wer": 0.0}


def test_metrics_combine():
    both = evaluate.combine([load_metric("bleu"), load_metric("chrf")])
    scores = both.compute(predictions=["the cat sat on it"], references=["the cat sat on it"])
    assert (scores["bleu"], scores["chrf"]) == (pytest.approx(100), pytest.approx(100))


def test_batches_add_up():
    metric = load_metric("accuracy")
    for predictions, references in (([0, 1], [0, 0]), ([1, 1], [1, 1])):
        metric.add_batch(predictions=predictions, references=references)
    assert metric.compute() == {"accuracy": 0.75}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_loads_and_says_whose_it_is(name):
    metric = load_metric(name)
    assert metric.citation
    assert metric.description


def test_an_unknown_metric_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"no metric 'blue'; there are accuracy, .*bleu"):
        load_metric("blue")


def test_a_missing_library_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.delitem(sys.modules, "variform.training.evaluation.metrics.translation", raising=False)
    with pytest.raises(ValueError, match="pip install evaluate sacrebleu"):
        load_metric("chrf")
