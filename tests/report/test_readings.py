"""What a model does with a text: the weights are those that it computes with, and the experts those that compute."""

import pytest
import torch
from tiny import build, inputs, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from variform.model.pattern_base import Text, visible_matrix
from variform.model.patterns import parse
from variform.report.attention_pictures import NOT_EXPLANATION, draw_attention, draw_experts, panels_of, show_attention
from variform.report.form import as_text
from variform.report.readings import Input, read_attention, read_experts, words_of
from variform.training.tokenizer import byte_tokenizer, train_tokenizer

LENGTH = 9
HEADS = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}


def make(shape: str, **fields):
    model = build(tiny(shape, **fields), HEADS[shape])
    ids, words = inputs(1, LENGTH), [f"w{place}" for place in range(LENGTH)]
    if shape != "encoder_decoder":
        return model, Input({"input_ids": ids}, {shape: words})
    written = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    return model, Input(written, {"encoder": words, "decoder": words[:4]})


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("spec", ["sliding_window:2", "strided:3", "big_bird:2,random=1", "local_global:2,tokens=1"])
def test_weights_outside_a_pattern_are_zero_and_rows_add_up_to_one(shape, spec):
    model, text = make(shape, attention_patterns=[spec, "full"])
    (attended,) = read_attention(model, text)
    assert attended.kind == shape and attended.weights.shape == (2, 3, LENGTH, LENGTH)
    seen = visible_matrix(parse(spec).at_layer(0), Text(LENGTH, shape == "decoder"))
    assert (attended.weights[0][:, ~seen] == 0).all() and (attended.weights[0][:, seen] > 0).all()
    assert_close(attended.weights.sum(-1), torch.ones(2, 3, LENGTH))


def test_a_pair_reads_in_three_ways_and_is_left_as_it_was():
    model, text = make("encoder_decoder")
    before = {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}
    found = {attended.kind: attended for attended in read_attention(model.train(), text)}
    assert {kind: tuple(attended.weights.shape[2:]) for kind, attended in found.items()} == {
        "encoder": (LENGTH, LENGTH),
        "decoder": (4, 4),
        "cross-attention": (4, LENGTH),
    }
    assert found["cross-attention"].keys == text.tokens["encoder"]
    assert model.training
    assert before == {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}


def test_sinks_are_noted():
    model, text = make("decoder", attention_sinks=True)
    (attended,) = read_attention(model, text)
    assert (attended.weights.sum(-1) < 1).all() and "sink" in attended.notes[0]


@pytest.mark.parametrize("router", ["softmax_topk", "switch", "sigmoid_bias", "expert_choice"])
def test_experts_are_those_that_the_router_chose(router):
    model, text = make("encoder", num_experts=4, router_type=router, expert_capacity_factor=None)
    routings = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, arguments, routing: routings.append(routing))
    found = read_experts(model, text)
    assert [taken.layer for taken in found] == ["encoder layer 0", "encoder layer 1"]
    for taken, routing in zip(found, routings):
        assert_close(taken.weights.sum(), routing.weights.sum())
        for place in range(LENGTH):
            rows = [place] if routing.tokens is None else (routing.tokens[0] == place).nonzero()[:, 0].tolist()
            pairs = [(row, slot) for row in rows for slot in range(routing.experts.shape[-1])]
            counted = [pair for pair in pairs if routing.counts is None or bool(routing.counts[0][pair])]
            wanted = sorted(int(routing.experts[0][pair]) for pair in counted)
            assert taken.taken[:, place].nonzero()[:, 0].tolist() == wanted


def test_a_dense_model_has_no_experts_to_show():
    with pytest.raises(ValueError, match="has no experts"):
        read_experts(*make("decoder"))


def test_panels_are_chosen_by_layer_and_head():
    found = read_attention(*make("encoder_decoder"))
    assert len(panels_of(found)) == 3 * 2 * 3
    assert [panel.title for panel in panels_of(found, layer=-1, head=0)] == [
        "encoder layer 1 head 0",
        "decoder layer 1 head 0",
        "cross-attention layer 1 head 0",
    ]
    with pytest.raises(ValueError, match=r"`layer=2` \(--layer\): the encoder has layers 0 to 1"):
        panels_of(found, layer=2)
    with pytest.raises(ValueError, match=r"`head=-4` \(--head\): the encoder has heads 0 to 2"):
        panels_of(found, head=-4)
    (many,) = read_attention(*make("encoder", num_hidden_layers=22))
    titles = [panel.title for panel in panels_of([many])]
    assert len(titles) == 22 and titles[-1] == "encoder layer 21, mean of 3 heads"


def test_the_terminal_shows_a_matrix_and_says_what_it_is_not():
    (attended,) = read_attention(*make("decoder", attention_patterns=["sliding_window:2"]))
    said = as_text(show_attention([attended], layer=0, head=1))
    rows = [line.partition("│")[2].partition("│")[0] for line in said.splitlines() if "│" in line]
    for place, row in enumerate(rows):
        cells = [row[2 * key : 2 * key + 2] for key in range(LENGTH)]
        assert [key for key, cell in enumerate(cells) if cell != "  "] == list(range(max(0, place - 1), place + 1))
    assert "decoder layer 0, head 1" in said
    assert " ".join(said.split()).endswith(NOT_EXPLANATION)


@pytest.mark.parametrize("chosen", [{}, {"layer": 0, "head": 1}, {"layer": 1}])
def test_pictures_are_written(chosen, tmp_path):
    found = read_attention(*make("encoder_decoder"))
    figure = draw_attention(found, path=tmp_path / "attention.png", **chosen)
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    assert "arXiv:1902.10186" in " ".join(figure.get_supxlabel().split())
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == len(panels_of(found, **chosen))
    with pytest.raises(ValueError, match="must end in"):
        draw_attention(found, path=tmp_path / "attention.jpg")
    experts = read_experts(*make("decoder", num_experts=4))
    assert len(draw_experts(experts, path=tmp_path / "experts.png").axes) == 2


def test_small_panels_of_a_short_text_name_its_tokens_at_the_edges(tmp_path):
    model, text = make("decoder", num_hidden_layers=2)
    figure = draw_attention(read_attention(model, text), path=tmp_path / "attention.png")
    named = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes if axes.get_visible()]
    assert named.count(text.tokens["decoder"]) == 2 and len(named) > 2


def test_bytes_of_a_letter_are_shown_as_the_letter_where_it_is_whole():
    trained = train_tokenizer(["the café, the café"] * 9, 290, frame="none")
    assert "".join(words_of(trained, trained("the café", return_tensors="pt")["input_ids"])) == "the·café"
    alone = byte_tokenizer()
    words = words_of(alone, alone("é a", return_tensors="pt", add_special_tokens=False)["input_ids"])
    assert words[-2:] == ["·", "a"] and len(words) == 4
