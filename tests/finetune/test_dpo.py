"""finetune/dpo.py: preferences with and without adapters, what they are measured against, and what is refused."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from script_inputs import WORDS, form, write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import variform

pytest.importorskip("trl", reason="trl is an extra of its own: dpo")

STEPS = ["--max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--learning_rate", "1e-2"]
PAIRS = [
    {"prompt": f"{n} {WORDS[n % 17]} film", "chosen": " was good", "rejected": " is dull and bad"} for n in range(23)
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Arguments with pairs; those to judge by fill a batch and a part of one."""
    folder = tmp_path_factory.mktemp("pairs")
    files = [write_lines(folder / "train.jsonl", PAIRS[:16]), write_lines(folder / "eval.jsonl", PAIRS[16:])]
    judged = ["--per_device_eval_batch_size", "4", "--max_length", "32", "--lr_scheduler_type", "constant"]
    return ["--train_files", files[0], "--eval_files", files[1], *judged, *STEPS]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("dpo")


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizers):
    """A decoder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["start"])
    fields = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    variform.from_config(json.loads(form("decoder", initializer_range=0.2, **fields))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def probability(model, tokenizer, pair: dict, answer: str) -> float:
    """Of an answer and its end, after the prompt, in nats."""
    prompt, whole = (tokenizer(text)["input_ids"] for text in (pair["prompt"], pair["prompt"] + pair[answer]))
    ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
    with torch.no_grad():
        chances = model(ids).logits[0, :-1].log_softmax(-1)
    return chances.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()


@pytest.mark.parametrize("adapted", [False, True])
def test_pairs_are_judged_against_the_model_that_training_started_from(script, pairs, base, tmp_path, adapted, capsys):
    adapter = ["--use_peft", "true", "--lora_r", "4"] if adapted else []
    argv = [*pairs, "--model", str(base), "--beta", "0.5", *adapter, "--output_dir", str(tmp_path)]
    assert script.main(argv) == 0
    first = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if adapted:
        from peft import PeftModel

        assert not (tmp_path / "ref").exists() and not (tmp_path / "model.safetensors").exists()
        last = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    else:
        last = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    margins = []
    for pair in PAIRS[16:]:
        gains = [
            probability(last, tokenizer, pair, a) - probability(first, tokenizer, pair, a)
            for a in ("chosen", "rejected")
        ]
        margins.append(0.5 * (gains[0] - gains[1]))
    measured = metrics(tmp_path)
    assert measured["margin"] == pytest.approx(sum(margins) / 7, rel=1e-5)
    assert measured["accuracy"] == pytest.approx(100 * sum(margin > 0 for margin in margins) / 7)
    assert measured["margin"] > 0.1 and measured["steps"] == 4 and measured["baselines"] == {"by chance": 50.0}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert next(line["rewards/margins"] for line in lines if "rewards/margins" in line) == pytest.approx(0, abs=1e-4)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(measured["accuracy"], abs=0.1)
    assert script.main(argv) == 0  # only judges, against what it began with and not what it became
    assert "holds a trained model" in capsys.readouterr().out
    again = metrics(tmp_path)
    assert (again["accuracy"], again["margin"]) == (measured["accuracy"], pytest.approx(measured["margin"], rel=1e-5))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_run_that_was_stopped_ends_as_one_in_one_piece(script, pairs, base, tmp_path, adapted):
    adapter = ["--use_peft", "true", "--lora_r", "2"] if adapted else []
    steps = [*pairs, "--model", str(base), *adapter, "--save_steps", "2"]
    assert script.main([*steps, "--max_steps", "5", "--output_dir", str(tmp_path / "whole")]) == 0
    assert script.main([*steps, "--max_steps", "2", "--output_dir", str(tmp_path / "parts")]) == 0
    resume = ["--resume", str(tmp_path / "parts" / "checkpoint-2"), "--max_steps", "5"]
    assert script.main([*steps, *resume, "--output_dir", str(tmp_path / "parts")]) == 0
    name = "adapter_model.safetensors" if adapted else "model.safetensors"
    whole, parts = (load_file(tmp_path / folder / name) for folder in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())
    assert metrics(tmp_path / "whole")["margin"] == metrics(tmp_path / "parts")["margin"]


def test_pairs_without_room_for_an_answer_are_counted_or_refused(script, pairs, base, tmp_path, capsys):
    long = {"prompt": " ".join(WORDS * 3), "chosen": " good", "rejected": " bad"}
    train = write_lines(tmp_path / "train.jsonl", [*PAIRS[:15], long])
    argv = [*pairs, "--train_files", train, "--model", str(base)]
    assert script.main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    assert "Examples train dropped: 1." in capsys.readouterr().out
    train = write_lines(tmp_path / "train.jsonl", [long])
    with pytest.raises(ValueError, match="`max_length=32` leaves no room for an answer in any pair of `train`"):
        script.main([*argv, "--output_dir", str(tmp_path / "none")])


def test_a_dry_run_tells_and_writes_nothing(script, pairs, base, tmp_path, capsys):
    assert script.main([*pairs, "--model", str(base), "--dry_run", "true", "--output_dir", str(tmp_path / "run")]) == 0
    assert "this was a dry run" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--form", "gpt2"], "`form`: preferences are learned by a model that can write already; give `model`"),
        (["--chosen_column", "better"], "better"),
        (["--train_files", "{turned}"], "chosen"),
        (["--model", "{transformed}"], "`lm_head_transform=True` puts a layer between"),
        (["--model", "{routed}"], "`router_aux_loss_coef=0.01`: trl would train without the balance loss"),
        (["--model", "{short}"], "`max_length=32` exceeds the model's table of 16 learned positions"),
        (["--tokenizer", "{endless}"], "`tokenizer` has no `eos_token`"),
        (["--sweep", "beta=0.1,0.2"], "`sweep` is for scripts that train new models"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(
    script, pairs, base, tokenizers, tmp_path, arguments, sentence
):
    turned = [{"prompt": pair["prompt"], "text": pair["chosen"], "rejected": pair["rejected"]} for pair in PAIRS[:8]]
    places = {"turned": write_lines(tmp_path / "turned.jsonl", turned), "endless": str(tmp_path / "endless")}
    forms = {
        "transformed": {"lm_head_transform": True},
        "routed": {"num_experts": 2},
        "short": {"position_embedding_type": "learned", "max_position_embeddings": 16},
    }
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["start"])
    for name, fields in forms.items():
        places[name] = str(tmp_path / name)
        if f"{{{name}}}" in arguments:
            fields = {"vocab_size": len(tokenizer), "pad_token_id": 0, **fields}
            variform.from_config(json.loads(form("decoder", **fields))).save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    start = ["--model", str(base), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError) as refused:
        script.main([*pairs, *start, *(word.format(**places) for word in arguments)])
    assert sentence in str(refused.value)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_experts_are_refused_unless_their_balance_is_given_up(script, pairs, tokenizers, tmp_path):
    base = tmp_path / "experts"
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["start"])
    fields = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    variform.from_config(json.loads(form("decoder", num_experts=2, **fields))).save_pretrained(base)
    tokenizer.save_pretrained(base)
    arguments = [*pairs, "--model", str(base), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="trl would train without the balance loss"):
        script.main(arguments)
    assert script.main([*arguments, "--balance_experts", "false"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.router_aux_loss_coef == 0
    assert AutoModelForCausalLM.from_pretrained(base).config.router_aux_loss_coef > 0
