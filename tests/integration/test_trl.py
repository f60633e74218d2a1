"""trl's trainers train our decoder.

trl 1.16 puts a fused head of its own on the model: it calls `model(..., fused_lm_head=True)`, runs the base model and reads
`lm_head.weight`, `logit_scale` and `final_logit_softcapping`. So the loss is trl's: label smoothing and z-loss of our config
take no part in it.
"""

import pytest
import torch
from tiny import VOCAB_SIZE, build, tiny

pytest.importorskip("trl", reason="trl belongs to the `test` extra")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

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
