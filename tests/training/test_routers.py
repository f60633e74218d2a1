"""Biases of routers move towards an even load, and what is said about the load is true."""

import json
import logging
import math
from datetime import timedelta

import pytest
import torch
import torch.multiprocessing as multiprocessing
from peft import LoraConfig, get_peft_model
from tiny import build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

from variform.training import BalanceRouters, ExpertStatistics, RouterBalancer, RouterLoads, watch_experts
from variform.training.routers import LOAD_FILE, summarize

HEADS = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
BIASED = {"num_experts": 4, "router_type": "sigmoid_bias", "router_bias_update_rate": 0.05}


def make(shape="decoder", **fields):
    fields = {**BIASED, **fields}
    if shape == "encoder_decoder":
        fields = {"encoder": fields, "decoder": fields}
    return build(tiny(shape, **fields), HEADS[shape]).train()


def biases(model) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def learn(model, input_ids, **kwargs) -> None:
    model(input_ids=input_ids, labels=input_ids, **kwargs).loss.backward()


def run(model, folder, data=None, callbacks=None, **options):
    """A Trainer's run on eight rows, by plain gradient descent."""
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "optim": "sgd", "logging_steps": 1, **options}
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    args = TrainingArguments(folder, **{"save_strategy": "no", "learning_rate": 0.1, **fixed, **options})
    data = inputs(batch=8) if data is None else data
    rows = [{"input_ids": row, "labels": row} for row in data]
    trainer = Trainer(model, args, train_dataset=rows, callbacks=callbacks)
    watch_experts(trainer)
    return trainer


@pytest.mark.parametrize("shape", HEADS)
def test_skewed_load_becomes_even_while_the_weights_are_frozen(shape):
    model = make(shape, router_bias_update_rate=0.01)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer[0] += 1.0  # every token goes to the first expert
    balancer, loads = RouterBalancer(model), RouterLoads(model)
    input_ids, peaks = inputs(batch=16, length=20), []
    for _ in range(150):
        model(input_ids=input_ids, labels=input_ids)
        peaks.append([summarize(count.tolist(), 2).max_load for count in loads.take()])
        balancer.step()
    assert len(peaks[0]) == len(balancer.routers)
    assert min(peaks[0]) == 2.0  # each token has two experts of four: the most there can be
    assert max(map(max, peaks[-10:])) < 1.25


def test_step_is_the_rule_of_the_paper():
    model = make(router_bias_update_rate=0.25)
    balancer = RouterBalancer(model)
    router = balancer.routers[0]
    seen = []
    router.register_forward_hook(lambda module, given, routing: seen.append(routing.load().sum(0)))
    learn(model, inputs())
    balancer.step()
    load = seen[0].float()
    assert_close(router.e_score_correction_bias, 0.25 * torch.sign(load.mean() - load))


def test_without_a_count_nothing_moves():
    model = make()
    balancer = RouterBalancer(model)
    balancer.step()
    model.eval()(inputs())
    balancer.step()
    with torch.no_grad():
        model.train()(inputs())
    balancer.step()
    assert not any(bias.any() for bias in biases(model))


def test_padding_has_no_say():
    moved = []
    for padding in (0, 5):
        model = make()
        balancer = RouterBalancer(model)
        input_ids, mask = pad(inputs(), left=0, right=padding)
        learn(model, input_ids, attention_mask=mask)
        balancer.step()
        moved.append(biases(model))
    assert_close(*moved)
    assert moved[0][0].any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_not_counted(use_reentrant):
    counted, calls = [], []
    for is_on in (False, True):
        model = make()
        if is_on:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        loads = RouterLoads(model)
        router = next(iter(loads.routers.values()))
        router.register_forward_hook(lambda *given, is_on=is_on: calls.append(is_on))
        learn(model, inputs())
        counted.append(loads.take())
    assert (calls.count(False), calls.count(True)) == (1, 2)  # it does call the router again
    assert_close(*counted)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_compiled_model_is_counted_as_it_is(is_checkpointed):
    moved = []
    for is_compiled in (False, True):
        model = make()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        balancer = RouterBalancer(model)
        called = torch.compile(model, backend="aot_eager") if is_compiled else model
        for number in range(2):
            learn(called, inputs(seed=number))
            balancer.step()
        moved.append(biases(model))
    assert_close(*moved)
    assert moved[0][0].any()


def test_micro_batches_move_the_bias_as_one_batch():
    moved = []
    for size in (4, 1):
        model = make()
        balancer = RouterBalancer(model)
        for _ in range(3):
            for rows in inputs(batch=4).split(size):
                learn(model, rows)
            balancer.step()
        moved.append(biases(model))
    assert_close(*moved)
    assert moved[0][0].any()


def test_trainer_moves_the_bias_the_same_for_one_by_four_and_four_by_one(tmp_path):
    moved = []
    for batch, accumulated in ((4, 1), (1, 4)):
        model = make()
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
        run(model, tmp_path, **options).train()
        moved.append(biases(model))
    assert_close(*moved)
    assert moved[0][0].any()


def process(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=100))
    model = make()
    balancer = RouterBalancer(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for rows in inputs(batch=8).split(4):
        learn(wrapped, rows[2 * rank : 2 * rank + 2])
        balancer.step()
    torch.save(biases(model), f"{folder}/{rank}.pt")
    del wrapped  # freed after its process group, it sometimes waits for ever
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_bias_of_one(tmp_path):
    multiprocessing.spawn(process, args=(str(tmp_path),), nprocs=2)
    model = make()
    balancer = RouterBalancer(model)
    for rows in inputs(batch=8).split(4):
        learn(model, rows)
        balancer.step()
    assert biases(model)[0].any()
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), biases(model))


def test_a_resumed_run_has_the_bias_of_the_whole_one(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make()
    run(whole, tmp_path, **options).train()
    lines = (tmp_path / LOAD_FILE).read_text().splitlines()
    resumed = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    saved = biases(resumed)
    assert saved[0].any()
    fresh = make()
    run(fresh, tmp_path / "other", max_steps=2).train()
    assert_close(saved, biases(fresh))
    run(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_close(biases(resumed), biases(whole))
    assert (tmp_path / LOAD_FILE).read_text().splitlines() == lines


@pytest.mark.parametrize("how", ["cast", "loaded"])
def test_bias_is_float32_in_a_model_of_bfloat16(how, tmp_path):
    model = make(router_bias_update_rate=0.001)
    model.model.layers[0].mlp.gate.e_score_correction_bias.fill_(0.5)
    if how == "cast":
        model = model.bfloat16()
    else:
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    balancer = RouterBalancer(model)
    learn(model, inputs())
    balancer.step()
    bias = biases(model)[0]
    assert bias.dtype == torch.float32
    assert ((bias - 0.5).abs() > 0.0009).any()
    assert_close(bias - 0.5, 0.001 * torch.sign(bias - 0.5), rtol=0, atol=1e-6)


def test_an_adapter_has_no_place_for_the_bias(tmp_path):
    model = get_peft_model(make(), LoraConfig())
    with pytest.raises(ValueError, match="adapter does not save"):
        RouterBalancer(model)
    run(model, tmp_path).train()
    assert not any(bias.any() for bias in biases(model))


def test_a_dense_model_is_not_watched(tmp_path):
    trainer = run(build(tiny("decoder"), AutoModelForCausalLM), tmp_path)
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert not kinds & {BalanceRouters, ExpertStatistics}


def test_callbacks_given_by_hand_are_not_doubled(tmp_path):
    own = ExpertStatistics(window=2)
    trainer = run(make(), tmp_path, callbacks=[own])
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ExpertStatistics)]
    assert found == [own]
    assert sum(isinstance(callback, BalanceRouters) for callback in trainer.callback_handler.callbacks) == 1


def test_hooks_go_with_the_training(tmp_path):
    model = make()
    run(model, tmp_path).train()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# Statistics


def test_summary_of_known_loads():
    even = summarize([5, 5, 5, 5, 0, 20])
    assert even == (1.0, 1.0, 0.0, 1.0)
    alone = summarize([10, 0, 0, 0, 30, 40])
    assert alone == (0.0, 4.0, 0.75, 0.0)
    pair = summarize([10, 10, 0, 0, 0, 20], 2)
    assert (pair.entropy, pair.max_load, pair.spread) == (pytest.approx(0.5), 2.0, pytest.approx(0.0))
    three = summarize([2, 1, 1, 0, 0, 4])
    assert three.entropy == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4))


@pytest.mark.parametrize("router_type", ["softmax_topk", "switch", "sigmoid_bias"])
def test_counts_are_those_of_the_choices(router_type):
    model = make("encoder", router_type=router_type, expert_capacity_factor=0.75)
    loads = RouterLoads(model)
    input_ids, mask = pad(inputs(batch=3), left=0, right=2)
    routings = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, given, routing: routings.append(routing))
    learn(model, input_ids, attention_mask=mask)
    *load, dropped, total = loads.take()[0].tolist()
    chosen, weights = routings[0].experts[:, :7], routings[0].weights[:, :7]
    assert total == chosen.numel()
    assert load == [int(((chosen == expert) & (weights > 0)).sum()) for expert in range(4)]
    assert dropped == int((weights == 0).sum()) > 0


def test_expert_choice_drops_tokens_that_no_expert_takes():
    model = make("encoder", router_type="expert_choice", num_experts_per_tok=1)
    loads = RouterLoads(model)
    routings = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda module, given, routing: routings.append(routing))
    input_ids, mask = pad(inputs(batch=3), left=2)
    learn(model, input_ids, attention_mask=mask)
    *load, dropped, total = loads.take()[0].tolist()
    routing = routings[0]
    taken = [set(row[keep].tolist()) for row, keep in zip(routing.tokens, routing.counts[..., 0])]
    assert load == [6, 6, 6, 6]  # two of seven tokens of each sequence
    assert total == 21
    assert dropped == 21 - sum(map(len, taken)) > 0


def test_figures_are_logged_and_written(tmp_path):
    seen = []

    class Reporter(ExpertStatistics):
        """Stands where a reporter of Trainer's stands: before the callbacks of the user."""

        def on_train_begin(self, *args, **kwargs):
            pass

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = run(make(), tmp_path, max_steps=4, logging_steps=2, eval_strategy="no")
    trainer.add_callback(Reporter())
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
    for entry, logs in zip(history, seen):
        assert 0 < entry["expert_entropy"] <= 1 <= entry["expert_max_load"] <= 2
        assert entry["expert_dropped"] == 0
        assert logs["expert_entropy"] == entry["expert_entropy"]
    lines = [json.loads(line) for line in (tmp_path / LOAD_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert list(line["load"]) == ["model.layers.0", "model.layers.1"]
        assert all(
            sum(load) == 2 * 4 * 7 * 2 for load in line["load"].values()
        )  # steps, rows, tokens, experts a token


def test_a_collapsed_layer_is_told_once(tmp_path, caplog, monkeypatch):
    model = make(router_type="softmax_topk", num_experts_per_tok=1, router_aux_loss_coef=0.0)
    with torch.no_grad():
        for router in RouterLoads(model).routers.values():
            router.weight.zero_()  # ties go to the first expert
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    statistics = ExpertStatistics(window=2)
    with caplog.at_level("WARNING"):
        run(model, tmp_path, callbacks=[statistics], max_steps=6, learning_rate=0.0).train()
    told = [record.message for record in caplog.records if "collapsed" in record.message]
    assert len(told) == 2
    assert "model.layers.0 has collapsed by step 2" in told[0]
    assert "4.0 times its share" in told[0]
