"""Stand-ins for the pipeline tests that the source distribution lacks: one class a task, with the two methods that
`test_pipeline_mixin.py` calls. Each runs the stock pipeline on two texts and looks at the form of the answer."""

import math
import unittest
from typing import Any, ClassVar

from transformers import Pipeline, PreTrainedModel, pipeline

TEXTS = ["this is a test", "this is another test, a longer one"]


class PipelineChecks:
    task: ClassVar[str]
    arguments: ClassVar[dict[str, Any]] = {}

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: Any = None, dtype: str = "float32", **processors: Any
    ) -> tuple[Pipeline, list[str]]:
        pipe = pipeline(self.task, model=model, tokenizer=tokenizer, dtype=dtype, **self.arguments)
        return pipe, self.texts(tokenizer)

    def texts(self, tokenizer: Any) -> list[str]:
        return TEXTS


class FeatureExtraction(PipelineChecks):
    task = "feature-extraction"

    def run_pipeline_test(self, pipe: Pipeline, texts: list[str]) -> None:
        if pipe.model.config.is_encoder_decoder:
            raise unittest.SkipTest("the pipeline gives an encoder-decoder no decoder input")
        answers = pipe(texts)
        assert [len(answer) for answer in answers] == [1, 1] and len(answers[1][0]) > len(answers[0][0])


class FillMask(PipelineChecks):
    task, arguments = "fill-mask", {"top_k": 3}

    def texts(self, tokenizer: Any) -> list[str]:
        return [f"this is a {tokenizer.mask_token}"]

    def run_pipeline_test(self, pipe: Pipeline, texts: list[str]) -> None:
        answers = pipe(texts[0])
        assert len(answers) == 3 and set(answers[0]) == {"sequence", "score", "token", "token_str"}


class TextClassification(PipelineChecks):
    task, arguments = "text-classification", {"top_k": None}

    def run_pipeline_test(self, pipe: Pipeline, texts: list[str]) -> None:
        for answer in pipe(texts):
            assert {label["label"] for label in answer} == set(pipe.model.config.label2id)


class TokenClassification(PipelineChecks):
    task = "token-classification"

    def run_pipeline_test(self, pipe: Pipeline, texts: list[str]) -> None:
        answers = pipe(texts)
        assert len(answers) == 2 and all({"entity", "score", "word"} <= set(token) for a in answers for token in a)


class ZeroShot(PipelineChecks):
    task, arguments = "zero-shot-classification", {"candidate_labels": ["this", "that"]}

    def run_pipeline_test(self, pipe: Pipeline, texts: list[str]) -> None:
        answer = pipe(texts[0])
        assert set(answer["labels"]) == {"this", "that"} and math.isclose(sum(answer["scores"]), 1, abs_tol=1e-3)


class TextGeneration(PipelineChecks):
    task, arguments = "text-generation", {"max_new_tokens": 5}

    def run_pipeline_test(self, pipe: Pipeline, texts: list[str]) -> None:
        assert pipe(texts[0])[0]["generated_text"].startswith(texts[0])
        assert texts[0] not in pipe(texts[0], return_full_text=False)[0]["generated_text"]
        assert [len(answers) for answers in pipe(texts, num_return_sequences=2, do_sample=True)] == [2, 2]


CHECKS = {
    "feature-extraction": FeatureExtraction,
    "fill-mask": FillMask,
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "zero-shot": ZeroShot,
    "text-generation": TextGeneration,
}
