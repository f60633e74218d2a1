"""What the heads are made of: the pooler of the base model, the transform, and which of them have a bias."""

import pytest
import torch
import transformers as hf
from tiny import STACK, build, inputs, pad, tiny
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
POOLED = [AutoModelForSequenceClassification, AutoModelForMultipleChoice]
CLASSIFIERS = [*POOLED, AutoModelForTokenClassification, AutoModelForQuestionAnswering]


def batch_for(auto_class) -> dict[str, torch.Tensor]:
    """Two texts of unequal length, padded on the right, and labels as the head takes them."""
    ids, mask = pad(inputs(), 0, 3)
    mask[1, 5:] = 0
    if auto_class is AutoModelForMultipleChoice:
        ids, mask = (tensor[:, None].repeat(1, 3, 1) for tensor in (ids, mask))
        ids[:, :, 2] = torch.tensor([3, 4, 5])
    labels: dict[str, torch.Tensor] = {"labels": torch.tensor([2, 0])}
    if auto_class is AutoModelForTokenClassification:
        labels = {"labels": (ids % 3).masked_fill(mask == 0, -100)}
    elif auto_class is AutoModelForQuestionAnswering:
        labels = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([4, 3])}
    return {"input_ids": ids, "attention_mask": mask, **labels}


class TestPooler:
    @pytest.mark.parametrize("auto_class", POOLED)
    def test_a_trained_pooler_stays_with_the_heads_that_read_it(self, auto_class, tmp_path):
        base = build(tiny("encoder", pooler=True))
        base.save_pretrained(tmp_path)
        model, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert set(info["missing_keys"]) == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
        assert_close(model.model.pooler.state_dict(), base.pooler.state_dict(), rtol=0, atol=0)

    @pytest.mark.parametrize("auto_class", [AutoModelForMaskedLM, *CLASSIFIERS[2:]])
    def test_a_head_of_tokens_has_none(self, auto_class):
        assert build(tiny("encoder", pooler=True), auto_class).model.pooler is None

    def test_the_classifier_reads_it(self):
        model = build(tiny("encoder", pooler=True, classifier_pooling="first"), AutoModelForSequenceClassification)
        ids, mask = pad(inputs(), 2)
        pooled = model.model.pooler.dense(model.model(ids, mask).last_hidden_state[:, 2]).tanh()
        assert_close(model(ids, mask).logits, model.classifier.out_proj(pooled))

    def test_its_activation_is_a_choice(self):
        """DistilBERT's pre_classifier, in the same places: relu."""
        model = build(tiny("encoder", pooler=True, classifier_pooling="first", pooler_act="relu"))
        output = model(inputs())
        assert_close(output.pooler_output, model.pooler.dense(output.last_hidden_state[:, 0]).relu())


class TestBias:
    @pytest.mark.parametrize(
        ("shape", "auto_class"),
        [
            *(("encoder", cls) for cls in CLASSIFIERS),
            *(("decoder", cls) for cls in CLASSIFIERS if cls is not AutoModelForMultipleChoice),
        ],
    )
    def test_heads_of_sequences_may_have_none(self, shape, auto_class):
        weights = build(tiny(shape, classifier_bias=False), auto_class).state_dict()
        biases = [name for name in weights if name.endswith("bias") and not name.startswith("model.")]
        assert bool(biases) is (auto_class not in POOLED)

    @pytest.mark.parametrize(("mlp_bias", "head_bias", "has_bias"), [(True, None, True), (True, False, False)])
    def test_the_transforms_bias_is_that_of_the_feed_forward_unless_said(self, mlp_bias, head_bias, has_bias):
        fields = {"mlp_bias": mlp_bias, "head_bias": head_bias}
        config = tiny("encoder", lm_head_transform=True, classifier_transform=True, **fields)
        transforms = [
            build(config, AutoModelForMaskedLM).head_transform,
            build(config, AutoModelForTokenClassification).classifier.transform,
        ]
        assert [transform.dense.bias is not None for transform in transforms] == [has_bias] * 2

    def test_a_change_of_width_alone_stays_linear(self):
        config = tiny("encoder", embedding_size=6, head_bias=True, head_act="gelu")
        assert set(build(config, AutoModelForMaskedLM).head_transform.state_dict()) == {"dense.weight"}


class TestTransform:
    @staticmethod
    def pair(auto_class, pooling: str = "mean") -> tuple[nn.Module, nn.Module]:
        """ModernBERT's class of transformers and ours, on one body and with the same weights in their heads."""
        fields = {"norm_eps": 1e-4, "norm_bias": True, "classifier_dropout": 0.3, "num_labels": 3}
        if auto_class is AutoModelForQuestionAnswering:
            fields["num_labels"] = 2
        native_config = hf.ModernBertConfig(
            **STACK | {"num_attention_heads": 2},
            **fields,
            classifier_pooling={"first": "cls"}.get(pooling, pooling),
            classifier_activation="relu",
            classifier_bias=True,
            pad_token_id=0,
        )
        form = {"norm_type": "layer_norm", "hidden_act": "gelu", "mlp_bias": False, "classifier_pooling": pooling}
        form |= {"classifier_transform": True, "head_act": "relu", "head_bias": True}
        native, ours = auto_class.from_config(native_config), build(tiny("encoder", **fields, **form), auto_class)
        head = ours.qa_outputs if auto_class is AutoModelForQuestionAnswering else ours.classifier
        native.head.load_state_dict(head.transform.state_dict())
        native.classifier.load_state_dict(head.out_proj.state_dict())
        native.model = ours.model
        return native, ours

    @pytest.mark.parametrize("is_training", [False, True])
    @pytest.mark.parametrize(
        ("auto_class", "pooling"),
        [*((cls, how) for cls in POOLED for how in ("first", "mean")), *((cls, "mean") for cls in CLASSIFIERS[2:])],
    )
    def test_classifiers_are_those_of_modernbert(self, auto_class, pooling, is_training):
        outputs = []
        for model in self.pair(auto_class, pooling):
            torch.manual_seed(0)  # dropout strikes the same channels
            outputs.append(model.train(is_training)(**batch_for(auto_class)))
        native, ours = outputs
        scores = [name for name in native if name.endswith("logits")]
        assert {"loss", *scores} <= set(ours)
        for name in ("loss", *scores):
            assert_close(ours[name], native[name], **CLOSE)

    @pytest.mark.parametrize("auto_class", CLASSIFIERS)
    def test_all_of_a_head_stands_under_one_name(self, auto_class):
        """Adapters save and train the heads that they know by name: `classifier` and `qa_outputs`."""
        weights = build(tiny("encoder", classifier_transform=True, pooler=True), auto_class).state_dict()
        names = {name.split(".")[0] for name in weights}
        assert names in ({"model", "classifier"}, {"model", "qa_outputs"})

    def test_the_masked_lm_head_is_robertas_whatever_the_feed_forward_uses(self):
        fields = {"norm_type": "layer_norm", "norm_eps": 1e-4, "hidden_act": "relu", "mlp_bias": False}
        head = {"lm_head_transform": True, "lm_head_bias": True, "head_act": "gelu", "head_bias": True}
        ours = build(tiny("encoder", **fields, **head), AutoModelForMaskedLM)
        native = hf.RobertaForMaskedLM(hf.RobertaConfig(**STACK, hidden_act="relu", layer_norm_eps=1e-4)).lm_head
        native.dense.load_state_dict(ours.head_transform.dense.state_dict())
        native.layer_norm.load_state_dict(ours.head_transform.norm.state_dict())
        native.decoder.load_state_dict(ours.lm_head.state_dict())
        ids, mask = pad(inputs(), 0, 3)
        assert_close(ours(ids, mask).logits, native(ours.model(ids, mask).last_hidden_state), **CLOSE)
