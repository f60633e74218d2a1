"""What a Trainer is told of answers: as the metrics say, in the order of the examples, whatever fills a batch up."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import EvalPrediction

from variform.training.data.masking import masked_scores
from variform.training.evaluation.metrics import load_metric
from variform.training.evaluation.scores import SCORES, TextScores, class_scores, count_answers
from variform.training.tokenizer import letters_and_symbols_tokenizer

TOKENIZER = letters_and_symbols_tokenizer("acdgot", ["K", "AE", "T", "D", "AO", "G"])


def predicted(*answers: str) -> EvalPrediction:
    """Ids as Trainer gathers them: a start, the answer, and its filler."""
    rows = [[TOKENIZER.bos_token_id, *TOKENIZER(answer)["input_ids"]] for answer in answers]
    longest = max(map(len, rows)) + 1
    return EvalPrediction(np.array([row + [-100] * (longest - len(row)) for row in rows]), None)


def test_answers_are_scored_as_the_metrics_do_it():
    references = ["K AE T", "D AO G"]
    scores = TextScores(TOKENIZER, references, ["chrf", "wer", "rouge"])(predicted("K AE T", "D AO T"))
    assert list(scores) == ["chrf", "wer", "rouge1", "rouge2", "rougeL"]
    assert scores["wer"] == pytest.approx(100 / 6)
    expected = load_metric("chrf").compute(predictions=["K AE T", "D AO T"], references=references)["chrf"]
    assert scores["chrf"] == pytest.approx(expected)
    assert scores["rouge1"] == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_examples_that_come_again_for_the_sake_of_other_processes_count_once():
    judge = TextScores(TOKENIZER, ["K AE T", "D AO G"], ["wer"])
    assert judge(predicted("K AE T", "D AO T", "T T T")) == judge(predicted("K AE T", "D AO T"))


@pytest.mark.parametrize("references", [["K AE T", "D AO G"], [["K AE T"], ["D AO T", "D AO G"]]])
def test_pronunciations_may_be_one_or_several(references):
    scores = TextScores(TOKENIZER, references, ["pronunciation"])(predicted("K AE T", "D AO G"))
    assert scores == {"wer": 0.0, "per": 0.0}


def test_mistakes_are_told_before_anything_is_judged():
    with pytest.raises(
        ValueError, match="`metrics` must be among bleu, chrf, rouge, wer, cer, pronunciation, got 'blue'"
    ):
        TextScores(TOKENIZER, ["a"], ["blue"])
    with pytest.raises(
        ValueError, match="The metric 'wer' holds an answer to one reference, and an example has several"
    ):
        TextScores(TOKENIZER, [["a", "b"]], ["wer"])


def test_every_metric_that_is_named_is_there_with_its_scores():
    for name, scores in SCORES.items():
        measured = TextScores(TOKENIZER, ["K AE T"], [name])(predicted("K AE T"))
        assert list(measured) == list(scores) and all(isinstance(value, float) for value in measured.values())


def test_classes_are_scored_in_per_cent_from_logits_alone_or_first_of_several_outputs():
    logits, truth = np.eye(2)[[0, 1, 1, 1]], np.array([0, 1, 1, 0])
    expected = {"accuracy": 75.0, "f1": pytest.approx(100 * (2 / 3 + 4 / 5) / 2)}
    assert class_scores(EvalPrediction(logits, truth)) == expected
    assert class_scores(EvalPrediction((logits, np.zeros((4, 3))), truth)) == expected


@pytest.mark.parametrize("several", [True, False])
def test_answers_of_an_encoder_decoder_are_counted_token_by_token(several):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[3, 1, -100, -100], [2, 6, 0, 5]])
    outputs = (logits, torch.randn(2, 3, 16)) if several else logits
    scores = masked_scores(EvalPrediction(count_answers(outputs, labels).numpy(), labels))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert scores["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(100 * (logits.argmax(-1) == labels).sum().item() / 6)
