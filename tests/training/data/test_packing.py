"""Packed documents compute what they would alone: losses, gradients, logits, and whole runs of a Trainer."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCAB_SIZE, build, inputs, tiny
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from variform.model import masks
from variform.training.data.packing import PackedDataset, PackingCollator, plan_rows

HEADS = {
    "encoder": AutoModelForMaskedLM,
    "decoder": AutoModelForCausalLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
}
ROOM, LONGEST = 24, 9
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Every scheme and pattern once, with experts, shared keys and what else a layer may have spread over them
FORMS = {
    "learned": {"position_embedding_type": "learned", "attention_patterns": ["full"]},
    "rope": {"position_embedding_type": "rope", "attention_patterns": ["sliding_window:2", "full"]},
    "relative_bias": {"position_embedding_type": "relative_bias", "attention_patterns": ["local_global:2,tokens=1"]},
    "alibi": {"position_embedding_type": "alibi", "attention_patterns": ["big_bird:2,random=1"]},
    "none": {"position_embedding_type": "none", "attention_patterns": ["sliding_window:3"]},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2, "router_type": "softmax_topk"},
    "shared keys": {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": "head"},
}


def make(shape: str, fields: dict, auto_class=None, **options):
    sides = {"encoder": fields, "decoder": fields} if shape == "encoder_decoder" else fields
    # The balance of experts is counted in a row, whatever it holds
    return build(tiny(shape, router_aux_loss_coef=0.0, **sides), auto_class or HEADS[shape], **options).train()


def draw(shape: str, lengths: list[tuple[int, int]], seed: int = 0) -> list[dict]:
    """Examples of random tokens: (source, target) lengths, of which shapes with one side take the first."""
    examples = []
    for number, (source, target) in enumerate(lengths):
        example = {"input_ids": inputs(1, source, seed=seed + number)[0].tolist()}
        if shape == "encoder_decoder":
            example["labels"] = inputs(1, target, seed=seed - number - 1)[0].tolist()
        elif shape == "encoder":  # every second token is to be restored
            hidden = inputs(1, source, seed=seed - number - 1)[0].tolist()
            example["labels"] = [token if place % 2 == 0 else -100 for place, token in enumerate(hidden)]
        examples.append(example)
    return examples


def rooms(shape: str, room: int = ROOM) -> dict[str, int]:
    return {"max_length": room, **({"max_target_length": room} if shape == "encoder_decoder" else {})}


def batches(shape: str, config, examples: list[dict], room: int = ROOM) -> tuple[dict, dict]:
    """All examples in one packed batch, and one a row."""
    rows = PackedDataset(examples, **rooms(shape, room))
    assert len(rows) < len(examples) or len(examples) < 2
    alone = PackingCollator(config, **rooms(shape, LONGEST))([[example] for example in examples])
    return PackingCollator(config, **rooms(shape, room))(list(rows)), alone


def loss_and_gradients(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


LENGTHS = st.lists(st.tuples(st.integers(1, LONGEST), st.integers(1, LONGEST)), min_size=2, max_size=7)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", HEADS)
def test_losses_and_gradients_are_those_of_documents_one_a_row(shape, name):
    model = make(shape, FORMS[name])

    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(LENGTHS, st.integers(0, 99))
    def check(lengths, seed):
        if all(source < 2 for source, _ in lengths):
            lengths[0] = (2, 2)  # a decoder has something to predict
        lengths = [
            (min(source, 5), min(target, 5)) if len(lengths) == 2 else (source, target) for source, target in lengths
        ]
        packed, alone = batches(shape, model.config, draw(shape, lengths, seed), room=4 * LONGEST)
        (loss, gradients), (expected, of_alone) = (loss_and_gradients(model, batch) for batch in (packed, alone))
        assert_close(loss, expected, **CLOSE)
        assert gradients.keys() == of_alone.keys()
        for part, gradient in gradients.items():
            assert_close(gradient, of_alone[part], **CLOSE, msg=part)

    check()


@pytest.fixture
def any_length_takes_blocks(monkeypatch):
    monkeypatch.setattr(masks, "SHORTEST_FOR_BLOCKS", 1)
    monkeypatch.setattr(masks, "COST_OF_A_PLANNED_SCORE", 0)


PAIRS = [(3, 5), (7, 2), (1, 4), (4, 1), (9, 9), (2, 6)]


@pytest.mark.parametrize(
    "fields", [{}, FORMS["shared keys"], {"attention_sinks": True}, {"attn_logit_softcapping": 2.0}]
)
def test_pairs_by_the_block_kernel_are_as_alone(fields, any_length_takes_blocks, monkeypatch):
    model, made = make("encoder_decoder", fields), []
    real = masks.plan_of_sources
    monkeypatch.setattr(masks, "plan_of_sources", lambda *args: made.append(real(*args)) or made[-1])
    packed, alone = batches("encoder_decoder", model.config, draw("encoder_decoder", PAIRS))
    (loss, gradients), (expected, of_alone) = (loss_and_gradients(model, batch) for batch in (packed, alone))
    assert made and made[0] is not None
    assert_close(loss, expected, **CLOSE)
    for part, gradient in gradients.items():
        assert_close(gradient, of_alone[part], **CLOSE, msg=part)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", HEADS)
def test_no_logit_of_a_document_changes_with_another(shape, backend):
    model = make(shape, {}, attn_implementation=backend).eval()
    examples = draw(shape, PAIRS[:4])
    collator = PackingCollator(model.config, **rooms(shape))
    logits = model(**collator([examples])).logits
    changed = [dict(example) for example in examples]
    for name in changed[1]:
        changed[1][name] = [3 + (token - 2) % (VOCAB_SIZE - 3) if token > 0 else token for token in changed[1][name]]
    differs = (model(**collator([changed])).logits != logits).any(-1)[0]
    lengths = [len(example["labels" if shape == "encoder_decoder" else "input_ids"]) for example in examples]
    own = torch.zeros(ROOM, dtype=torch.bool)
    own[lengths[0] : lengths[0] + lengths[1]] = True
    real = torch.arange(ROOM) < sum(lengths)
    assert differs[own].all() and not differs[~own & real].any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_pairs_under_flex_attention_are_as_under_eager():
    wide = {"hidden_size": 16, "head_dim": 16, "num_hidden_layers": 1}
    models = [make("encoder_decoder", wide, attn_implementation=name).eval() for name in ("eager", "flex_attention")]
    batch = PackingCollator(models[0].config, **rooms("encoder_decoder"))([draw("encoder_decoder", PAIRS[:4])])
    real = batch["decoder_attention_mask"].bool()
    with torch.compiler.set_stance("force_eager"):
        eager, flex = (model(**batch).logits[real] for model in models)
    assert_close(flex, eager, rtol=1e-3, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(any_length_takes_blocks):
    model = make("encoder_decoder", {})
    batch, _ = batches("encoder_decoder", model.config, draw("encoder_decoder", PAIRS))
    _, expected = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable()
    _, gradients = loss_and_gradients(model, batch)
    for part, gradient in gradients.items():
        assert_close(gradient, expected[part], msg=part)


@torch.no_grad()
def test_a_compiled_model_packs_pairs_too():
    model = make("encoder_decoder", {}).eval()
    model.config.use_cache = False
    batch = PackingCollator(model.config, **rooms("encoder_decoder"))([draw("encoder_decoder", PAIRS[:4])])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    real = batch["decoder_attention_mask"].bool()
    del batch["labels"]
    assert_close(compiled(**batch).logits[real], model(**batch).logits[real], **CLOSE)


class TestRefusals:
    def test_other_numbers_of_sources_and_targets(self):
        model = make("encoder_decoder", {})
        batch = PackingCollator(model.config, **rooms("encoder_decoder"))([draw("encoder_decoder", PAIRS[:4])])
        batch.pop("decoder_position_ids")
        with pytest.raises(
            ValueError, match=r"Row 0 packs 4 sources and 1 targets.*`decoder_position_ids` must restart"
        ):
            model(**batch)

    def test_labels_alone_do_not_say_where_targets_start(self):
        model = make("encoder_decoder", {})
        batch = PackingCollator(model.config, **rooms("encoder_decoder"))([draw("encoder_decoder", PAIRS[:4])])
        batch.pop("decoder_input_ids")
        with pytest.raises(
            ValueError, match=r"a pack of documents, but `labels` without `decoder_input_ids` are for one"
        ):
            model(**batch)

    @pytest.mark.parametrize(
        "auto_class", [AutoModelForSequenceClassification, AutoModelForQuestionAnswering, AutoModelForMultipleChoice]
    )
    def test_heads_that_give_one_answer_a_row(self, auto_class):
        model, ids, positions = make("encoder", {}, auto_class), inputs(1, 7), torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
        if auto_class is AutoModelForMultipleChoice:
            ids, positions = (part[:, None].expand(-1, 2, -1) for part in (ids, positions))
        with pytest.raises(ValueError, match=r"a pack of documents, but .* is for one: give one a row"):
            model(ids, position_ids=positions)

    @pytest.mark.parametrize("fields", [{"router_type": "expert_choice"}, {"expert_capacity_factor": 1.0}])
    def test_experts_that_serve_rows(self, fields):
        with pytest.raises(ValueError, match="would compete for experts"):
            PackingCollator(tiny("encoder", num_experts=4, **fields), ROOM)

    def test_documents_longer_than_a_row_are_counted(self):
        examples = draw("decoder", [(5, 1), (9, 1), (8, 1)])
        with pytest.raises(
            ValueError, match=r"2 of 3 documents are longer than `max_length=7`, the longest has 9 tokens"
        ):
            PackedDataset(examples, 7)

    def test_empty_documents_are_counted(self):
        with pytest.raises(ValueError, match="1 of 2 documents are empty"):
            PackedDataset([{"input_ids": []}, {"input_ids": [3]}], 7)

    def test_a_stream_without_a_length(self):
        with pytest.raises(TypeError, match="without a length"):
            PackedDataset(iter([]), 7)

    def test_padding_inside_an_example(self):
        with pytest.raises(ValueError, match="tokenize without padding"):
            PackingCollator(tiny("decoder"), ROOM)([[{"input_ids": [3, 0], "attention_mask": [1, 0]}]])

    def test_one_label_a_document(self):
        with pytest.raises(ValueError, match="length 1 for a document of 3 tokens"):
            PackingCollator(tiny("encoder"), ROOM)([[{"input_ids": [3, 4, 5], "labels": 1}]])


class TestPlan:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 20)), min_size=1, max_size=40), st.integers(0, 9))
    def test_every_document_stands_once_and_no_row_overflows(self, lengths, seed):
        table = np.array(lengths)
        rows = plan_rows(table, (10, 20), seed=seed, window=16)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        assert all((table[row].sum(0) <= (10, 20)).all() for row in rows)

    def test_it_is_a_function_of_the_seed(self):
        table = np.random.default_rng(0).integers(1, 50, (300, 1))
        plans = [plan_rows(table, (64,), seed=seed) for seed in (0, 0, 1)]
        assert plans[0] == plans[1] != plans[2]

    def test_short_documents_fill_the_gaps_that_long_ones_leave(self):
        rows = plan_rows(np.array([[6], [4], [7], [3], [8], [2]]), (10,))
        assert sorted(map(sorted, rows)) == [[0, 1], [2, 3], [4, 5]]

    def test_a_large_set_is_nearly_full(self):
        lengths = np.random.default_rng(0).geometric(0.02, 5000).clip(max=256)[:, None]
        rows = plan_rows(lengths, (256,))
        assert lengths.sum() / (256 * len(rows)) > 0.98


class TestCollator:
    def test_a_row_of_a_decoder(self):
        batch = PackingCollator(tiny("decoder"), 6)([[{"input_ids": [5, 6, 7]}, {"input_ids": torch.tensor([8, 9])}]])
        assert {name: part.tolist() for name, part in batch.items()} == {
            "input_ids": [[5, 6, 7, 8, 9, 0]],
            "position_ids": [[0, 1, 2, 0, 1, 0]],
            "attention_mask": [[1, 1, 1, 1, 1, 0]],
            "labels": [[-100, 6, 7, -100, 9, -100]],
        }

    def test_a_row_of_pairs(self):
        rows = [[{"input_ids": [5, 6], "labels": [7, -100, 8]}, {"input_ids": [9], "labels": [10]}]]
        batch = PackingCollator(tiny("encoder_decoder"), 4, max_target_length=5)(rows)
        assert batch["input_ids"].tolist() == [[5, 6, 9, 0]]
        assert batch["decoder_input_ids"].tolist() == [[1, 7, 0, 1, 0]]
        assert batch["decoder_position_ids"].tolist() == [[0, 1, 2, 0, 0]]
        assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 1, 0]]
        assert batch["labels"].tolist() == [[7, -100, 8, 10, -100]]

    def test_tokens_to_restore_are_drawn_in_the_row(self):
        def masking(ids, special_tokens_mask):
            hidden = (torch.arange(ids.shape[1]) % 2 == 0) & (special_tokens_mask == 0)
            return ids.masked_fill(hidden, 4), ids.masked_fill(~hidden, -100)

        rows = [
            [
                {"input_ids": [5, 6, 7], "special_tokens_mask": [1, 0, 0]},
                {"input_ids": [8, 9], "special_tokens_mask": [0, 0]},
            ]
        ]
        batch = PackingCollator(tiny("encoder"), 7, masking=masking)(rows)
        assert batch["input_ids"].tolist() == [[5, 6, 4, 8, 4, 0, 0]]
        assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100, -100]]

    def test_labels_of_tokens_keep_their_places(self):
        examples = [{"input_ids": inputs(1, n)[0].tolist(), "labels": [n % 2] * n} for n in (3, 4)]
        model = make("encoder", {}, AutoModelForTokenClassification)
        packed, alone = (PackingCollator(model.config, 9)(rows) for rows in ([examples], [[one] for one in examples]))
        assert_close(model(**packed).loss, model(**alone).loss, **CLOSE)


def train(model, folder, examples, resume=None, **changes):
    shape = "encoder_decoder" if model.config.is_encoder_decoder else "decoder"
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 3}
    options |= {"optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "save_steps": 3, "max_grad_norm": 0.0}
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**options, **changes}, **fixed),
        train_dataset=PackedDataset(examples, **rooms(shape)),
        data_collator=PackingCollator(model.config, **rooms(shape)),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class TestTrainer:
    @pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
    def test_a_run_that_is_resumed_is_the_run_that_was_not_stopped(self, shape, tmp_path):
        examples = draw(shape, [(1 + 5 * n % LONGEST, 1 + 7 * n % LONGEST) for n in range(50)])
        dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
        whole = train(make(shape, dropout), tmp_path / "whole", examples)
        again = train(make(shape, dropout), tmp_path / "again", examples, resume=str(tmp_path / "whole/checkpoint-3"))
        steps = whole.state.max_steps
        assert 3 < steps // 2 + 1 < steps == again.state.global_step
        for (name, expected), part in zip(whole.model.named_parameters(), again.model.parameters()):
            assert torch.equal(part, expected), name

    def test_every_label_weighs_the_same_however_rows_are_batched(self, tmp_path):
        """One accumulated step over all rows is the gradient of the mean over all labels of the documents alone."""
        examples = draw("decoder", [(1 + 5 * n % LONGEST, 1) for n in range(20)])
        model = make("decoder", {})
        alone = PackingCollator(model.config, LONGEST)([[example] for example in examples])
        expected, gradients = loss_and_gradients(model, alone)
        before = {name: part.detach().clone() for name, part in model.named_parameters()}
        trainer = train(
            model, tmp_path, examples, num_train_epochs=1, gradient_accumulation_steps=9, save_strategy="no"
        )
        assert trainer.state.global_step == 1
        assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
        for name, part in model.named_parameters():
            assert_close(part, before[name] - 0.1 * gradients[name], **CLOSE, msg=name)
