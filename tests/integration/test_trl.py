"""trl's trainers train our decoder.

trl 1.16 puts a fused head of its own on the model: it calls `model(..., fused_lm_head=True)`, runs the base model and reads
`lm_head.weight`, `logit_scale` and `final_logit_softcapping`. So the loss is trl's: label smoothing, z-loss and the losses of
routers take no part in it, and a layer before `lm_head` would be passed over.
"""

import pytest
import torch
from tiny import VOCAB_SIZE, build, tiny

pytest.importorskip("trl", reason="trl belongs to the `test` extra")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from variform.model import pretrained

WORDS = ["<pad>", "<s>", "</s>", *"abcdefghijklmnop"]
TEXTS = ["a b c d e f g", "b c d e f", "c d e f g h i j", "d e f g"] * 2


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter, in the vocabulary of the tiny models."""
    assert len(WORDS) == VOCAB_SIZE
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def options(tmp_path, **changes):
    plain = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return {"output_dir": tmp_path, "logging_steps": 1, "max_steps": 12, "learning_rate": 1e-2, **plain, **changes}


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


FORMS = {
    "plain": {},
    "scaled": {"logit_scale": 0.5, "final_logit_softcapping": 5.0, "lm_head_bias": True, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_supervised_loss_starts_at_ours_and_falls(form, tokenizer, tmp_path):
    model = build(tiny("decoder", **FORMS[form]), AutoModelForCausalLM)
    data = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(
        model,
        SFTConfig(**options(tmp_path), per_device_train_batch_size=len(TEXTS)),
        train_dataset=data,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = model.eval()(**batch).loss.item()
    trainer.train()
    history = logged(trainer, "loss")
    assert history[0] == pytest.approx(expected, rel=1e-4)
    assert history[-1] < 0.8 * history[0]


def test_supervised_training_of_an_adapter_evaluates(tokenizer, tmp_path):
    model = build(tiny("decoder"), AutoModelForCausalLM)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    data = Dataset.from_dict({"text": TEXTS})
    trainer = SFTTrainer(
        model,
        SFTConfig(**options(tmp_path, eval_strategy="steps", eval_steps=6)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    trainer.train()
    evaluated = logged(trainer, "eval_loss")
    assert evaluated[1] < evaluated[0]
    base = {name.replace("base_layer.", ""): weight for name, weight in model.state_dict().items()}
    assert all(torch.equal(weight, base[name]) for name, weight in before.items())


def test_preference_training_prefers_the_chosen_answers(tokenizer, tmp_path):
    pairs = {"prompt": ["a b", "b c"] * 4, "chosen": [" c d", " d e"] * 4, "rejected": [" p o", " o p"] * 4}
    trainer = DPOTrainer(
        build(tiny("decoder"), AutoModelForCausalLM),
        ref_model=build(tiny("decoder"), AutoModelForCausalLM),
        args=DPOConfig(**options(tmp_path)),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    margins = logged(trainer, "rewards/margins")
    assert margins[0] == pytest.approx(0.0, abs=1e-4)
    assert margins[-1] > 0.1
    assert logged(trainer, "loss")[-1] < 0.65


def test_a_trained_model_generates_and_computes_logits(tokenizer, tmp_path):
    """trl leaves its patched forward on the model: without the flag it is ours."""
    model = build(tiny("decoder"), AutoModelForCausalLM)
    SFTTrainer(
        model,
        SFTConfig(**options(tmp_path, max_steps=1)),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    ).train()
    input_ids = torch.tensor([[3, 4, 5]])
    assert model.eval()(input_ids).logits.shape == (1, 3, VOCAB_SIZE)
    assert model.generate(input_ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 6)


EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}


def supervised(model, tokenizer, tmp_path, **changes) -> SFTTrainer:
    return SFTTrainer(
        model,
        SFTConfig(**options(tmp_path, per_device_train_batch_size=len(TEXTS), max_steps=1, **changes)),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["nll", "dft", "smoothed"])
def test_every_loss_of_supervised_training_is_that_of_our_logits(form, mode, tokenizer, tmp_path):
    """The step before any update, in the words of each loss."""
    model = build(tiny("decoder", **FORMS[form]), AutoModelForCausalLM)
    changes = {"smoothed": {"label_smoothing_factor": 0.2}}.get(mode, {"loss_type": mode})
    trainer = supervised(model, tokenizer, tmp_path, **changes)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        logits = model.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    counts = targets != -100
    surprise = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")[counts]
    if mode == "dft":
        surprise = surprise * (-surprise).exp()
    if mode == "smoothed":
        surprise = 0.8 * surprise - 0.2 * logits.log_softmax(-1).mean(-1)[counts]
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(surprise.mean().item(), rel=1e-4)


def test_packed_texts_do_not_see_each_other(tokenizer, tmp_path):
    losses = []
    for packing in (False, True):
        torch.manual_seed(0)
        model = build(tiny("decoder"), AutoModelForCausalLM)
        trainer = supervised(model, tokenizer, tmp_path, packing=packing, max_length=64)
        trainer.train()
        losses.append(logged(trainer, "loss")[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"lm_head_transform": True}, "`lm_head_transform=True`"), ({"embedding_size": 8}, "`embedding_size=8`")],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_layer_before_the_head_is_refused(fields, named, adapted, tokenizer, tmp_path):
    model = build(tiny("decoder", **fields), AutoModelForCausalLM)
    adapter = {"peft_config": LoraConfig(task_type="CAUSAL_LM")} if adapted else {}
    with pytest.raises(ValueError, match=f"{named} puts a layer between"):
        SFTTrainer(
            model,
            SFTConfig(**options(tmp_path)),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
            **adapter,
        )
    pairs = {"prompt": ["a b"], "chosen": [" c d"], "rejected": [" p o"]}
    if not adapted:
        adapter = {"ref_model": build(tiny("decoder", **fields), AutoModelForCausalLM)}
    with pytest.raises(ValueError, match=f"{named} puts a layer between"):
        DPOTrainer(
            build(tiny("decoder", **fields), AutoModelForCausalLM),
            args=DPOConfig(**options(tmp_path)),
            train_dataset=Dataset.from_dict(pairs),
            processing_class=tokenizer,
            **adapter,
        )


def test_routers_are_trained_without_their_balance_loss_only_when_told(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef=0.01`: trl would train without the balance loss"):
        supervised(build(tiny("decoder", **EXPERTS), AutoModelForCausalLM), tokenizer, tmp_path)
    data = {"chosen": ["a b c"], "rejected": ["a b d"]}
    with pytest.raises(ValueError, match="trl would train without the balance loss"):
        RewardTrainer(
            build(tiny("decoder", **EXPERTS, num_labels=1), AutoModelForSequenceClassification),
            RewardConfig(**options(tmp_path)),
            train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
        )
    model = build(tiny("decoder", **EXPERTS), AutoModelForCausalLM)
    trainer = supervised(model, tokenizer, tmp_path, router_aux_loss_coef=0.0)
    with torch.no_grad():
        expected = model.eval()(**next(iter(trainer.get_train_dataloader()))).loss.item()
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-4) and not logged(trainer, "aux_loss")
    # What trl wrote into the config does not make it take another model's balance loss the next time
    trainer.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.output_router_logits is False
    again.config.router_aux_loss_coef = 0.01
    with pytest.raises(ValueError, match="trl would train without the balance loss"):
        supervised(again, tokenizer, tmp_path)
    again.config.router_aux_loss_coef = 0.0
    supervised(again, tokenizer, tmp_path).train()


def test_what_takes_no_part_in_the_loss_is_named(tokenizer, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(pretrained.logger, "warning_once", told.append)
    form = {"label_smoothing": 0.1, "z_loss_coef": 1e-4, "router_z_loss_coef": 1e-3, "router_aux_loss_coef": 0.0}
    supervised(build(tiny("decoder", **EXPERTS, **form), AutoModelForCausalLM), tokenizer, tmp_path)
    names = "`label_smoothing=0.1`, `z_loss_coef=0.0001`, `router_z_loss_coef=0.001`"
    assert told == [f"trl computes the loss itself: {names} takes no part in it."]
    supervised(build(tiny("decoder"), AutoModelForCausalLM), tokenizer, tmp_path)
    build(tiny("decoder", label_smoothing=0.1), AutoModelForCausalLM).add_model_tags(["mine"])
    assert len(told) == 1
