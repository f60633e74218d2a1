"""Classes by examples in the prompt: templates, which examples, scores that are those of plain forwards, the curve."""

import copy
import statistics
from collections import Counter

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from torch.nn import functional as F

import variform
from variform.training.evaluation.few_shot import (
    Point,
    Template,
    answer_questions,
    draw_curve,
    draw_examples,
    measure_curve,
    score_answers,
)
from variform.training.tokenizer import train_tokenizer

TEMPLATE = "Text: {text}\\nClass: {label}\\n\\n"
FORM = {
    "model_type": "variform_decoder",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Text: a good bad film\nClass: good bad"] * 3, 300, frame="start")


def model_of(**fields):
    torch.manual_seed(0)
    return variform.from_config({**FORM, **fields}).eval()


class TestTemplate:
    def test_a_question_ends_where_its_answers_begin(self):
        template = Template.read(TEMPLATE, ["bad", "good"])
        assert template.example("a film {label}", 1) == "Text: a film {label}\nClass: good\n\n"
        assert template.question("a film") == "Text: a film\nClass:"
        assert template.answers() == [" bad", " good"]

    @pytest.mark.parametrize(
        "template", ["{text}", "{label} {text}", "{text} {text} {label}", "{text} {label} {label}"]
    )
    def test_what_is_no_template_is_refused(self, template):
        with pytest.raises(ValueError, match="`template` must have"):
            Template.read(template, ["bad", "good"])

    def test_classes_of_one_word_are_refused(self):
        with pytest.raises(ValueError, match="all different, got good, good"):
            Template.read(TEMPLATE, ["good", "good"])


class TestExamples:
    LABELS = [0] * 9 + [1] * 6 + [2] * 7

    @pytest.mark.parametrize("shots", [0, 1, 3, 5, 12])
    def test_they_are_balanced_over_the_classes(self, shots):
        chosen = draw_examples(self.LABELS, shots, seed=1)
        counts = Counter(self.LABELS[number] for number in chosen)
        assert len(set(chosen)) == shots
        assert max(counts.values(), default=0) - min((counts[label] for label in range(3)), default=0) <= 1

    def test_fewer_are_among_more_and_a_seed_draws_the_same(self):
        few, more = (draw_examples(self.LABELS, shots, seed=2) for shots in (4, 8))
        assert set(few) < set(more)
        assert more == draw_examples(self.LABELS, 8, seed=2) != draw_examples(self.LABELS, 8, seed=3)

    def test_more_than_there_are_is_refused(self):
        draw_examples([0, 0, 1], 3, seed=0)
        with pytest.raises(ValueError, match="`few_shot=4` asks for more examples than a class has"):
            draw_examples([0, 0, 1], 4, seed=0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_patterns": ["sliding_window:4", "full"]},
        {"position_embedding_type": "alibi"},
        {"num_experts": 4, "num_experts_per_tok": 2},
    ],
    ids=["full", "window", "alibi", "experts"],
)
@pytest.mark.parametrize("shared", [0, 7])
def test_scores_are_those_of_a_forward_of_each_answer(fields, shared):
    model = model_of(**fields)
    torch.manual_seed(1)
    begin = torch.randint(300, (shared,)).tolist()
    prompts = [[*begin, first, *torch.randint(300, (length,)).tolist()] for first, length in ((5, 4), (6, 0), (7, 9))]
    answers = [[[11], [12, 13, 14], [15, 16]]] * 3
    found = score_answers(model, prompts, answers)
    for row, (prompt, own) in enumerate(zip(prompts, answers)):
        for column, answer in enumerate(own):
            ids = torch.tensor([[*prompt, *answer]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1]
            assert found[row, column].item() == pytest.approx(
                -F.cross_entropy(logits, ids[0, len(prompt) :]).item(), abs=1e-4
            )


def test_one_prompt_is_scored_as_among_others():
    model = model_of()
    prompts, answers = [[1, 2, 3], [1, 2, 3]], [[[4], [5, 6]]] * 2
    both, alone = score_answers(model, prompts, answers), score_answers(model, prompts[:1], answers[:1])
    torch.testing.assert_close(both, alone.expand(2, 2), atol=1e-5, rtol=0)


def test_an_answer_is_the_likeliest_word_behind_the_examples(tokenizer):
    model = model_of()
    template = Template.read(TEMPLATE, ["bad", "good"])
    texts = ["a film", "good film", "a bad bad film"]
    found = answer_questions(model, tokenizer, template, [("a good film", 1), ("bad", 0)], texts)
    expected = []
    for text in texts:
        shown = f"Text: a good film\nClass: good\n\nText: bad\nClass: bad\n\nText: {text}\nClass:"
        likelihoods = []
        for word in (" bad", " good"):
            ids = tokenizer(shown + word, return_tensors="pt")["input_ids"]
            begin = len(tokenizer(shown)["input_ids"])
            with torch.no_grad():
                likelihoods.append(-F.cross_entropy(model(ids).logits[0, begin - 1 : -1], ids[0, begin:]).item())
        expected.append(likelihoods.index(max(likelihoods)))
    assert found == expected


def test_prompts_beyond_a_table_of_positions_are_refused(tokenizer):
    model = model_of(position_embedding_type="learned", max_position_embeddings=16)
    with pytest.raises(ValueError, match="exceeds the model's table of 16 learned positions"):
        answer_questions(model, tokenizer, Template.read(TEMPLATE, ["bad", "good"]), [("a film", 1)] * 4, ["film"])


@pytest.fixture
def data():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    rows = {"text": [f"a {word} film" for word in "abcdefgh"], "label": [0, 1] * 4}
    return DatasetDict(
        {split: Dataset.from_dict(copy.deepcopy(rows), features=features) for split in ("train", "validation")}
    )


def test_a_curve_has_a_figure_for_each_draw(tokenizer, data):
    told = []
    template = Template.read(TEMPLATE, ["bad", "good"])
    points = measure_curve(model_of(), tokenizer, data, template, shots=[0, 2], seeds=[0, 1, 2], tell=told.append)
    assert [len(point.accuracies) for point in points] == [1, 3] and len(told) == 4
    labels, texts = list(data["train"]["label"]), list(data["validation"]["text"])
    examples = [(data["train"][n]["text"], data["train"][n]["label"]) for n in draw_examples(labels, 2, seed=1)]
    found = answer_questions(model_of(), tokenizer, template, examples, texts)
    right = [answer == label for answer, label in zip(found, data["validation"]["label"])]
    assert points[1].accuracies[1] == pytest.approx(100 * statistics.mean(right))


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are an extra")
    points = [Point(0, [50.0]), Point(4, [60.0, 70.0])]
    assert points[1].mean == 65 and points[0].deviation == 0
    path = draw_curve(points, tmp_path / "plots" / "few_shot.png", title="a", baselines={"most frequent class": 50})
    assert path.read_bytes()[:4] == b"\x89PNG"
