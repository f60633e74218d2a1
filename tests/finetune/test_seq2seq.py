"""finetune/seq2seq.py: pairs and spans, padded and packed, letters and words, adapters, beams, and what is refused."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from script_inputs import WORDS, form, write_lines
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, T5Config
from transformers import T5ForConditionalGeneration as T5

import variform
from variform.training.data.packing import PackedDataset, PackingCollator
from variform.training.data.span_corruption import SpanCorruption
from variform.training.data.tokenizing import tokenize_documents

FORM = form("encoder_decoder", position_embedding_type="rope")
STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--learning_rate", "1e-2"]
SIZES = ["--max_source_length", "24", "--max_target_length", "12", "--metrics", "chrf"]


def phrase(number: int, words: int = 5) -> str:
    return " ".join(WORDS[(number + 5 * place) % len(WORDS)] for place in range(words))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Arguments with phrases and their first words."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [{"text": f"{phrase(n)} {n}", "target": phrase(n, 2)} for n in range(24)]
    files = ["--train_files", write_lines(folder / "train.jsonl", rows[:18])]
    return [*files, "--eval_files", write_lines(folder / "eval.jsonl", rows[18:]), *STEPS, *SIZES]


@pytest.fixture(scope="module")
def script(load_script):
    return load_script("seq2seq")


@pytest.fixture(scope="module")
def start(tokenizers):
    return ["--form", FORM, "--tokenizer", tokenizers["end"]]


def metrics(folder) -> dict:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def spans(script, start, pairs, tmp_path_factory):
    """A model that learned to fill in spans."""
    folder = tmp_path_factory.mktemp("spans") / "run"
    learned = ["--objective", "spans", "--save_steps", "1", "--output_dir", str(folder)]
    assert script.main([*pairs, *start, *learned]) == 0
    return folder


def test_answers_are_judged_with_each_beam_beside_the_baseline(script, pairs, start, tmp_path, capsys):
    asked = ["--metrics", "chrf", "rouge", "--beams", "1", "2", "--baseline", "lead", "--prefix", "sum: "]
    argv = [*pairs, *start, *asked, "--output_dir", str(tmp_path / "run")]
    assert script.main(argv) == 0
    measured = metrics(tmp_path / "run")
    names = ["chrf", "rouge1", "rouge2", "rougeL"]
    assert [name for name in measured if name.startswith(("chrf", "rouge"))] == [
        *names,
        *(f"{name}, beam 2" for name in names),
    ]
    assert measured["baselines"]["rouge1, first 2 words"] == pytest.approx(100)  # these targets are their first words
    said = capsys.readouterr().out
    assert "chrf, beam 2" in said and "rougeL, first 2 words" in said
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert card.data.eval_results[0].metric_value == pytest.approx(measured["chrf"], abs=0.01)
    assert "sum: " in card.text
    # Of targets as long as they may be, the end is written too
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert model.generation_config.max_length == 13
    assert script.main(argv) == 0
    assert "holds a trained model" in capsys.readouterr().out and metrics(tmp_path / "run") == measured


def test_pairs_give_equal_losses_padded_and_packed_and_alone(script, tokenizers):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["end"])
    rows = [{"text": phrase(n, 2 + 3 * n), "target": phrase(n, 4 - n)} for n in range(3)]
    data = DatasetDict({split: Dataset.from_list(rows) for split in ("train", "validation")})
    torch.manual_seed(0)
    stacks = {side: {**json.loads(FORM)[side], "vocab_size": 330} for side in ("encoder", "decoder")}
    ids = {"pad_token_id": 0, "decoder_start_token_id": 1}
    model = variform.from_config({"model_type": "variform_encoder_decoder", **stacks, **ids}).eval()
    task = script.TextToTextArguments(max_source_length=48, max_target_length=24)
    examples, _, report = script.make_pairs(task, data, tokenizer, model.config, seed=0)
    assert not any(report.values())
    padded = DataCollatorForSeq2Seq(tokenizer, model=model)([dict(row) for row in examples])
    rows = PackedDataset(examples, 48, max_target_length=24)
    packed = PackingCollator(model.config, 48, max_target_length=24)([rows[0]])
    assert len(rows) == 1 and len(padded["input_ids"]) == 3
    total = count = 0
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in (padded, packed)]
        for row in examples:
            target = torch.tensor([row["labels"]])
            logits = model(torch.tensor([row["input_ids"]]), labels=target).logits
            total += F.cross_entropy(logits[0], target[0], reduction="sum").item()
            count += target.numel()
    assert losses == pytest.approx([total / count] * 2, abs=1e-5)


def test_spans_are_learned_and_judged_token_by_token(script, start, pairs, spans, tokenizers):
    measured = metrics(spans)
    tokenizer, model = AutoTokenizer.from_pretrained(spans), AutoModelForSeq2SeqLM.from_pretrained(spans).eval()
    held_out = [{"text": f"{phrase(n)} {n}"} for n in range(18, 24)]
    texts = tokenize_documents(DatasetDict({"validation": Dataset.from_list(held_out)}), tokenizer, max_length=24)
    nats = count = hits = 0
    for example in SpanCorruption(texts.data["validation"], tokenizer, seed=0):
        target = torch.tensor([example["labels"]])
        with torch.no_grad():
            logits = model(torch.tensor([example["input_ids"]]), labels=target).logits
        nats += F.cross_entropy(logits[0], target[0], reduction="sum").double()
        hits += (logits.argmax(-1) == target).sum().item()
        count += target.numel()
    assert measured["perplexity"] == pytest.approx(torch.exp(nats / count).item(), rel=1e-5)
    assert measured["accuracy"] == pytest.approx(100 * hits / count)


@pytest.mark.parametrize("rows", ["pad", "pack"])
def test_other_spans_are_cut_out_in_each_epoch(script, start, pairs, tmp_path, rows, monkeypatch):
    told = []
    monkeypatch.setattr(SpanCorruption, "set_epoch", lambda self, epoch: told.append(epoch))
    learned = ["--objective", "spans", "--rows", rows, "--max_steps", "7", "--per_device_train_batch_size", "8"]
    assert script.main([*pairs, *start, *learned, "--output_dir", str(tmp_path)]) == 0
    assert max(told) >= 1 and set(told) == set(range(max(told) + 1))


def test_pairs_go_on_from_spans_packed_and_with_adapters(script, pairs, spans, tmp_path, capsys):
    more = ["--model", str(spans), "--rows", "pack", "--prompts", phrase(3), "--output_dir", str(tmp_path / "lora")]
    argv = [*pairs, *more, "--use_peft", "true", "--lora_r", "2"]
    assert script.main(argv) == 0
    said = capsys.readouterr().out
    assert "18 documents in" in said and phrase(3) in said and "new process" not in said
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    base, measured = load_file(spans / "model.safetensors"), metrics(tmp_path / "lora")
    assert script.main(argv) == 0
    assert metrics(tmp_path / "lora")["chrf"] == measured["chrf"]
    # The base is as it was, and an adapter is all that was saved
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    assert all(torch.equal(weight, base[name]) for name, weight in load_file(spans / "model.safetensors").items())


def test_it_goes_on_from_t5(script, pairs, tokenizers, tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    native = T5(T5Config(vocab_size=330, pad_token_id=0, eos_token_id=2, **sizes)).eval()
    native.save_pretrained(tmp_path / "t5")
    start = ["--model", str(tmp_path / "t5"), "--tokenizer", tokenizers["end"], "--learning_rate", "0"]
    assert script.main([*pairs, *start, "--output_dir", str(tmp_path / "run")]) == 0
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run").eval()
    ids, labels = torch.randint(3, 300, (2, 7)), torch.randint(3, 300, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=labels).logits, native(ids, labels=labels).logits)


@pytest.mark.parametrize("objective", ["pairs", "spans"])
def test_a_run_that_was_stopped_ends_as_one_in_one_piece(script, pairs, start, tmp_path, objective):
    steps = [*pairs, *start, "--objective", objective, "--save_steps", "3", "--lr_scheduler_type", "constant"]
    assert script.main([*steps, "--max_steps", "7", "--output_dir", str(tmp_path / "whole")]) == 0
    assert script.main([*steps, "--max_steps", "3", "--output_dir", str(tmp_path / "parts")]) == 0
    resume = ["--resume", str(tmp_path / "parts" / "checkpoint-3"), "--max_steps", "7"]
    assert script.main([*steps, *resume, "--output_dir", str(tmp_path / "parts")]) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], weight) for name, weight in whole.items())


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Arguments with words and how they are spoken, some in two ways."""
    folder = tmp_path_factory.mktemp("letters")
    rows = [
        {"text": word, "target": " ".join(word.upper()), "variants": [" ".join(word.upper()), "A B"]}
        for word in ("cab", "bad", "dab", "fade", "beef", "face")
    ]
    train = write_lines(
        folder / "train.jsonl",
        [{"text": r["text"], "target": r["target"], "variants": r["variants"]} for r in rows[:4]],
    )
    files = ["--train_files", train, "--eval_files", write_lines(folder / "eval.jsonl", rows[4:])]
    judged = ["--tokenizer", "letters", "--metrics", "pronunciation", "--references_column", "variants"]
    return [*files, *STEPS, *judged, "--form", FORM, "--max_target_length", "12"]


def test_letters_become_words_of_capitals(script, letters, tmp_path):
    assert script.main([*letters, "--output_dir", str(tmp_path)]) == 0
    vocabulary = AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert {*"abcdef", *"ABCDEF"} <= set(vocabulary)
    assert len(vocabulary) == 4 + 12 == AutoModelForSeq2SeqLM.from_pretrained(tmp_path).config.decoder.vocab_size
    assert set(metrics(tmp_path)) >= {"wer", "per"}


def test_a_dry_run_tells_and_writes_nothing(script, pairs, start, tmp_path, capsys):
    assert script.main([*pairs, *start, "--dry_run", "true", "--output_dir", str(tmp_path / "run")]) == 0
    assert "this was a dry run" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_new_processes_answer_prompts_alike(script, pairs, start, tmp_path, capsys):
    asked = ["--prompts", phrase(1), phrase(2), "--output_dir", str(tmp_path)]
    assert script.main([*pairs, *start, *asked]) == 0
    said = capsys.readouterr().out
    assert phrase(2) in said and said.count("the same answers") == 2, said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--objective", "spans", "--baseline", "copy"], "`baseline=copy` reads targets, and `objective=spans` has"),
        (["--objective", "spans", "--tokenizer", "letters"], "`tokenizer=letters` reads targets"),
        (["--objective", "spans", "--max_target_length", "3"], "`max_target_length` is 3: raise it"),
        (["--objective", "spans", "--tokenizer", "bytes"], "`tokenizer` has no sentinels"),
        (["--metrics", "blue"], "`metrics` must be among bleu, chrf"),
        (["--references_column", "answers"], "answers"),
        (["--form", "gpt2"], "`form` is a variform_decoder; this script trains"),
        (["--set", "position_embedding_type=learned", "--max_target_length", "65"], "`max_target_length=65` exceeds"),
        (["--set", "position_embedding_type=learned", "--max_source_length", "65"], "`max_source_length=65` exceeds"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(script, pairs, start, tmp_path, arguments, sentence):
    with pytest.raises(ValueError) as refused:
        script.main([*pairs, *start, *arguments, "--output_dir", str(tmp_path)])
    assert sentence in str(refused.value)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_targets_beyond_the_decoders_vocabulary_and_without_a_token_are_refused(script, tokenizers):
    tokenizer = AutoTokenizer.from_pretrained(tokenizers["end"])
    data = DatasetDict({split: Dataset.from_list([{"text": "a", "target": "b"}]) for split in ("train", "validation")})
    stacks = {
        side: {**json.loads(FORM)[side], "vocab_size": size} for side, size in (("encoder", 400), ("decoder", 70))
    }
    config = variform.VariformEncoderDecoderConfig(**stacks, pad_token_id=0, decoder_start_token_id=1)
    with pytest.raises(ValueError, match=r"labels\[0, 0\] = \d+, but `vocab_size` is 70"):
        script.make_pairs(script.TextToTextArguments(), data, tokenizer, config, seed=0)
    plain = AutoTokenizer.from_pretrained(tokenizers["end"])
    plain.backend_tokenizer.post_processor = None  # no end of a text
    data["validation"] = Dataset.from_list([{"text": "a", "target": "b"}, {"text": "a", "target": ""}])
    config = variform.VariformEncoderDecoderConfig(
        encoder=stacks["encoder"], decoder=stacks["encoder"], pad_token_id=0, decoder_start_token_id=1
    )
    with pytest.raises(ValueError, match="1 held-out targets have no token"):
        script.make_pairs(script.TextToTextArguments(), data, plain, config, seed=0)
