"""What holds for every form: random ones of the three shapes, and each value of the larger choices on its own."""

import tempfile
from unittest import mock

import pytest
import strategies
import torch
import transformers
from hypothesis import given, settings
from strategies import forms
from tiny import CONFIGS, IDS, VOCAB_SIZE, build, inputs, pad
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from variform import AUTO_MAP
from variform.model import masks

CLOSE = {"rtol": 2e-4, "atol": 2e-4}
BATCH, LENGTH, SOURCE = 2, 7, 5
LABELS = {
    "AutoModelForMaskedLM": "tokens",
    "AutoModelForCausalLM": "tokens",
    "AutoModelForSeq2SeqLM": "tokens",
    "AutoModelForTokenClassification": "token_classes",
    "AutoModelForSequenceClassification": "classes",
    "AutoModelForMultipleChoice": "choices",
    "AutoModelForQuestionAnswering": "spans",
}


def fixed_forms() -> dict[str, strategies.Form]:
    """Forms that hold one value each of the choices with many values, so that none is left to chance."""
    base = {"vocab_size": VOCAB_SIZE, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2}
    base |= {"num_attention_heads": 3, "head_dim": 8, "max_position_embeddings": strategies.MAX_LENGTH, **IDS}
    base |= {"initializer_range": 0.3, "attention_patterns": ["sliding_window:3", "full"]}
    found = {}
    for act in strategies.ACTIVATIONS:
        found[f"act-{act}"] = ("decoder", {**base, "hidden_act": act, "lm_head_transform": True})
    for rope in strategies.ROPES:
        for part in (1.0, 0.5):
            parameters = strategies.rope_parameters(rope, 8, part)
            found[f"rope-{rope}-{part}"] = ("decoder", {**base, "rope_parameters": parameters})
    mixed = {
        "full_attention": strategies.rope_parameters("yarn", 8),
        "sliding_attention": strategies.rope_parameters("default", 8, 0.5),
    }
    found["rope-by-layer-type"] = ("decoder", {**base, "rope_parameters": mixed})
    return found


FIXED = fixed_forms()


def heads_of(config) -> list[str]:
    """The Auto classes of the shape, but AutoConfig."""
    return [name for name in AUTO_MAP[config.model_type] if name != "AutoConfig"]


def make(form: strategies.Form):
    shape, fields = form
    return CONFIGS[shape](**fields)


def run(model, ids, mask=None, **kwargs) -> torch.Tensor:
    """Hidden states of a stack; of an encoder-decoder's decoder, reading a fixed source."""
    if model.config.is_encoder_decoder:
        kwargs = {f"decoder_{k}" if k in ("inputs_embeds", "position_ids") else k: v for k, v in kwargs.items()}
        source = inputs(len(ids) if ids is not None else BATCH, SOURCE, seed=1)
        return model(source, decoder_input_ids=ids, decoder_attention_mask=mask, **kwargs).last_hidden_state
    return model(ids, mask, **kwargs).last_hidden_state


def check_round_trip(config) -> None:
    for auto_name in heads_of(config):
        model = build(config, getattr(transformers, auto_name))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = getattr(transformers, auto_name).from_pretrained(folder)
        assert not loaded.training
        for before, after in ((model.state_dict(), loaded.state_dict()), (buffers(model), buffers(loaded))):
            assert before.keys() == after.keys()
            for name in before:
                assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=False, msg=name)
        ids = inputs(BATCH, LENGTH)
        if auto_name == "AutoModelForMultipleChoice":
            ids = ids[:, None].expand(-1, 3, -1)
        feed = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
        with torch.no_grad():
            # The last bit may depend on where a tensor lies in memory
            assert_close(loaded(ids, **feed)[0], model(ids, **feed)[0], rtol=1e-6, atol=1e-6)


def buffers(model) -> dict[str, torch.Tensor]:
    return dict(model.named_buffers())


@torch.no_grad()
def check_cache(config) -> None:
    """Token by token and in two chunks, left-padded or not, a cache changes nothing."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = build(config, auto_class)
    for left in (0, 2):
        ids, mask = pad(inputs(BATCH, LENGTH), left)
        mask[1] = 1  # a shorter and a longer text in one batch
        if left:
            ids[1] = inputs(1, LENGTH + left, seed=2)
        feed, mask_name = {}, "attention_mask"
        if config.is_encoder_decoder:
            source, source_mask = pad(inputs(BATCH, SOURCE, seed=1), 0, 2)
            feed, mask_name = {"input_ids": source, "attention_mask": source_mask}, "decoder_attention_mask"
        ids_name = "decoder_input_ids" if config.is_encoder_decoder else "input_ids"
        whole = model(**feed, **{ids_name: ids, mask_name: mask}).logits
        for cuts in ([1] * ids.shape[1], [4, ids.shape[1] - 4]):
            cache, start, pieces = None, 0, []
            for size in cuts:
                end = start + size
                piece = {ids_name: ids[:, start:end], mask_name: mask[:, :end]}
                output = model(**feed, **piece, past_key_values=cache, use_cache=True)
                cache, start = output.past_key_values, end
                pieces.append(output.logits)
            real = mask.bool()
            assert_close(torch.cat(pieces, dim=1)[real], whole[real], **CLOSE)


@torch.no_grad()
def check_padding(config) -> None:
    """Padding on either side changes nothing on real tokens."""
    model = build(config)
    ids = inputs(BATCH, LENGTH)
    alone = run(model, ids)
    for left, right in ((3, 0), (0, 3), (1, 2)):
        padded, mask = pad(ids, left, right)
        output = run(model, padded, mask)
        assert_close(output[:, left : left + LENGTH], alone, **CLOSE)
        if config.is_encoder_decoder:
            output = model(padded, mask, decoder_input_ids=ids).last_hidden_state
            assert_close(output, model(ids, decoder_input_ids=ids).last_hidden_state, **CLOSE)


@torch.no_grad()
def check_packing(config) -> None:
    """Documents in one row, told apart by positions that restart, are as on their own."""
    model = build(config)
    ids = inputs(1, 9)
    lengths = (4, 1, 1, 3)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    if config.routes_by_row:
        with pytest.raises(ValueError, match=r"`position_ids` restart .* one document a row"):
            run(model, ids, position_ids=positions)
        return
    packed = run(model, ids, position_ids=positions)
    padded, mask = pad(ids, 0, 2)
    with_padding = run(model, padded, mask, position_ids=nn.functional.pad(positions, (0, 2)))
    start = 0
    for length in lengths:
        alone = run(model, ids[:, start : start + length])
        assert_close(packed[:, start : start + length], alone, **CLOSE)
        assert_close(with_padding[:, start : start + length], alone, **CLOSE)
        start += length


@torch.no_grad()
def check_embeds(config) -> None:
    """Token embeddings can be handed in for ids."""
    model = build(config)
    ids = inputs(BATCH, LENGTH)
    table = model.decoder if config.is_encoder_decoder else model
    assert_close(run(model, None, inputs_embeds=table.get_input_embeddings()(ids)), run(model, ids), rtol=0, atol=0)
    if config.is_encoder_decoder:
        embeds = model.get_input_embeddings()(ids)
        by_embeds = model(inputs_embeds=embeds, decoder_input_ids=ids).last_hidden_state
        assert_close(by_embeds, model(ids, decoder_input_ids=ids).last_hidden_state, rtol=0, atol=0)


def check_backends(config) -> None:
    """sdpa, where it can express the form, and the block kernel give eager's hidden states and gradients."""
    model = build(config, attn_implementation="eager")
    try:
        fast = build(config, attn_implementation="sdpa")
    except ValueError as error:
        refused = [name for name in ("attn_logit_softcapping", "attention_sinks") if f"`{name}=" in str(error)]
        assert refused, error
        return
    ids, mask = pad(inputs(BATCH, LENGTH), 2, 1)
    mask[1] = 1
    blocks = build(config, attn_implementation="sdpa")
    outputs = [run(one, ids, mask)[mask.bool()] for one in (model, fast)]
    with mock.patch.multiple(masks, SHORTEST_FOR_BLOCKS=1, COST_OF_A_PLANNED_SCORE=0):
        outputs.append(run(blocks, ids, mask)[mask.bool()])
    for output in outputs:
        assert_close(output, outputs[0], **CLOSE)
        output.square().mean().backward()
    for other in (fast, blocks):
        for (name, slow), quick in zip(model.named_parameters(), other.parameters()):
            if slow.grad is not None or quick.grad is not None:
                assert_close(
                    quick.grad, slow.grad, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
                )


def batch_for(auto_name: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs and labels of one head."""
    batch, length = ids.shape
    kind = LABELS[auto_name]
    if kind == "choices":
        return {"input_ids": ids[:, None].expand(-1, 3, -1), "labels": ids[:, 0] % 3}
    labels = {
        "tokens": {"labels": ids},
        "token_classes": {"labels": ids % 2},
        "classes": {"labels": ids[:, 0] % 2},
        "spans": {"start_positions": torch.zeros(batch).long(), "end_positions": torch.full((batch,), length - 1)},
    }
    return {"input_ids": ids, **labels[kind]}


def check_gradients(config) -> None:
    """In training, each parameter of each head gets a finite gradient, with and without checkpointing."""
    for auto_name in heads_of(config):
        model = build(config, getattr(transformers, auto_name)).train()
        if len(auto_name) % 2:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ids = inputs(3, LENGTH)
        if auto_name == "AutoModel":
            feed = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
            output = model(ids, **feed)
            loss = output.last_hidden_state.square().sum()
            if getattr(output, "pooler_output", None) is not None:
                loss = loss + output.pooler_output.square().sum()
        else:
            loss = model(**batch_for(auto_name, ids)).loss
        assert loss.isfinite()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{auto_name}: {name} has no gradient"
            assert parameter.grad.isfinite().all(), f"{auto_name}: {name}"


CHECKS = {
    "cache": check_cache,
    "padding": check_padding,
    "packing": check_packing,
    "embeds": check_embeds,
    "backends": check_backends,
    "gradients": check_gradients,
    "round_trip": check_round_trip,
}


@given(forms())
@settings(max_examples=10)
def test_a_saved_form_loads_bit_equal(form):
    check_round_trip(make(form))


@given(forms("decoder", "encoder_decoder"))
@settings(max_examples=30)
def test_a_cache_changes_nothing(form):
    check_cache(make(form))


@given(forms())
@settings(max_examples=40)
def test_padding_changes_nothing(form):
    check_padding(make(form))


@given(forms("encoder", "decoder"))
@settings(max_examples=40)
def test_packed_documents_do_not_see_each_other(form):
    check_packing(make(form))


@given(forms())
@settings(max_examples=25)
def test_embeddings_stand_for_ids(form):
    check_embeds(make(form))


@given(forms())
@settings(max_examples=40)
def test_backends_agree(form):
    check_backends(make(form))


@given(forms())
@settings(max_examples=25)
def test_every_parameter_gets_a_finite_gradient(form):
    check_gradients(make(form))


@pytest.mark.parametrize("check", ["cache", "padding", "packing", "backends"])
@pytest.mark.parametrize("name", [name for name in FIXED if name.startswith("rope")])
def test_each_rope_type(name, check):
    CHECKS[check](make(FIXED[name]))


@pytest.mark.parametrize("act", strategies.ACTIVATIONS)
def test_each_activation(act):
    config = make(FIXED[f"act-{act}"])
    check_cache(config)
    model = build(config, AutoModelForCausalLM).train()
    ids = inputs(3, LENGTH)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


WORLD = 2


def losses_of(form: strategies.Form, auto_name: str, ids: torch.Tensor, wrap=lambda model: model) -> tuple:
    """Loss and gradients of one training step with checkpointing, after `wrap`."""
    model = build(make(form), getattr(transformers, auto_name)).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    wrapped = wrap(model)  # kept until backward, in which DDP averages
    loss = wrapped(**batch_for(auto_name, ids)).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def train_on_a_share(rank: int, store: str, jobs: list, results: str) -> None:
    """One process: its share of each batch under DDP; rank 0 writes losses and gradients averaged over all."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    found = []
    for form, auto_name, ids in jobs:
        loss, gradients = losses_of(form, auto_name, ids.chunk(WORLD)[rank], DistributedDataParallel)
        distributed.all_reduce(loss)
        found.append((loss / WORLD, gradients))
    if rank == 0:
        torch.save(found, results)
    distributed.destroy_process_group()


def without_chance(form: strategies.Form) -> strategies.Form:
    """The form without dropout and jitter, which differ from process to process."""
    shape, fields = form
    chances = ("dropout", "layerdrop", "jitter_noise")
    quiet = {name: 0.0 for name in fields if name.endswith(chances)}
    sides = {side: without_chance((shape, fields[side]))[1] for side in ("encoder", "decoder") if side in fields}
    return shape, {**fields, **quiet, **sides}


def test_two_processes_train_as_one(tmp_path):
    jobs = []
    ids = inputs(4, LENGTH)
    for form in strategies.sample(forms(), 8):
        auto_names = [name for name in heads_of(make(form)) if name in LABELS]
        auto_name = auto_names[len(jobs) % len(auto_names)]
        jobs.append((without_chance(form), auto_name, ids))
    # A layer that chance drops in one process must still answer there
    dropping = ("decoder", {**FIXED["act-gelu"][1], "layerdrop": 0.5, "hidden_dropout": 0.1})
    jobs.append((dropping, "AutoModelForCausalLM", ids))
    arguments = (str(tmp_path / "store"), jobs, str(tmp_path / "results"))
    torch.multiprocessing.spawn(train_on_a_share, arguments, nprocs=WORLD)
    found = torch.load(tmp_path / "results")
    for (form, auto_name, _), (loss, gradients) in zip(jobs[:-1], found):
        expected_loss, expected = losses_of(form, auto_name, ids)
        assert_close(loss, expected_loss, **CLOSE)
        for name, gradient in gradients.items():
            assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert all(gradient is not None for gradient in found[-1][1].values())
