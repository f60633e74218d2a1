"""Segment memory: a text read in pieces, with each layer's last inputs kept, against the text in one and the formula."""

import copy

import pytest
import torch
from tiny import build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, StaticCache
from transformers.cache_utils import EncoderDecoderCache

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
XL = {"position_embedding_type": "transformer_xl", "norm_type": "layer_norm"}
FORMS = {
    "transformer_xl": XL,
    "transformer_xl_post": {**XL, "norm_placement": "post", "num_attention_heads": 4, "num_key_value_heads": 2},
    "rope": {"qk_norm": "head", "attention_sinks": True},
    "rope_parallel": {"parallel_residual": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "alibi_reordered": {"position_embedding_type": "alibi", "norm_placement": "reordered"},
    "relative_bias_sandwich": {"position_embedding_type": "relative_bias", "norm_placement": "sandwich"},
    "learned": {"position_embedding_type": "learned", "attn_logit_softcapping": 2.0},
    "shared_layers": {**XL, "num_hidden_groups": 1, "embedding_size": 8},
}


def decoder(form: str = "transformer_xl", **fields):
    # Small weights, so that float32 keeps five digits; no end of sequence, so that every run is as long as asked for
    defaults = {"memory_length": 24, "eos_token_id": None, "initializer_range": 0.2}
    return build(tiny("decoder", **{**FORMS[form], **defaults, **fields}), AutoModelForCausalLM)


def read(model, ids, sizes, mask=None, memory=None) -> torch.Tensor:
    """The logits of a text that is read in pieces of `sizes`."""
    pieces, start = [], 0
    for size in sizes:
        end = start + size
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        output = model(ids[:, start:end], past_key_values=memory, use_cache=True, **given)
        memory, start = output.past_key_values, end
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def from_the_paper(model, ids, memories) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Transformer-XL of arXiv:1901.02860, sec. 3, on the weights of `model`: the last states, and the next memories."""
    config, scheme = model.config, model.relative_positions
    size, count = config.head_dim, ids.shape[1]
    hidden, kept = model.embeddings(model.embed_tokens(ids), None), []
    for number, memory in enumerate(memories):
        layer = model.layers[number * len(model.layers) // len(memories)]
        attention, residual = layer.self_attn, layer.attention_residual
        is_pre = config.norm_placement == "pre"
        both = torch.cat((memory, hidden), dim=1)
        kept.append(both[:, -config.memory_length :].detach())
        both = residual.input_norm(both) if is_pre else both
        query = (both[:, -count:] @ attention.q_proj.weight.T).unflatten(-1, (-1, size))
        key, value = (both @ part.weight.T for part in (attention.k_proj, attention.v_proj))
        groups = config.num_attention_heads // config.num_key_value_heads
        key, value = (part.unflatten(-1, (-1, size)).repeat_interleave(groups, 2) for part in (key, value))
        places = torch.arange(both.shape[1])
        distances = places[-count:, None] - places
        angles = distances[..., None] / 10000 ** (torch.arange(0, config.hidden_size, 2) / config.hidden_size)
        waves = torch.cat((angles.sin(), angles.cos()), dim=-1) @ attention.r_proj.weight.T
        scores = torch.einsum("bqhd,bkhd->bhqk", query + scheme.u, key)
        scores = scores + torch.einsum("bqhd,qkhd->bhqk", query + scheme.v, waves.unflatten(-1, (-1, size)))
        weights = (scores * size**-0.5).masked_fill(distances < 0, float("-inf")).softmax(-1)
        branch = torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2) @ attention.o_proj.weight.T
        hidden = hidden + branch if is_pre else residual.output_norm(hidden + branch)
        residual = layer.mlp_residual
        branch = layer.mlp(residual.input_norm(hidden) if is_pre else hidden)
        hidden = hidden + branch if is_pre else residual.output_norm(hidden + branch)
    return (hidden if model.norm is None else model.norm(hidden)), kept


class TestAgainstThePaper:
    @pytest.mark.parametrize("memory_length", [3, 7, 30])
    @pytest.mark.parametrize("form", ["transformer_xl", "transformer_xl_post", "shared_layers"])
    def test_outputs_and_gradients_of_a_training_loop(self, form, memory_length):
        """Segments longer and shorter than the memory; the loss of all of them."""
        model = decoder(form, memory_length=memory_length).model.train()
        ids, sizes = inputs(2, 16), (5, 2, 1, 8)
        memory, memories = None, [torch.zeros(2, 0, 12)] * 2
        found, expected = [], []
        for piece in ids.split(sizes, dim=1):
            output = model(piece, past_key_values=memory, use_cache=True)
            memory = output.past_key_values
            found.append(output.last_hidden_state)
            states, memories = from_the_paper(model, piece, memories)
            expected.append(states)
            assert_close(found[-1], states, **CLOSE)
            for layer, kept in zip(memory.layers, memories):
                assert_close(layer.keys[:, 0], kept, **CLOSE)
        gradients = []
        for states in (found, expected):
            model.zero_grad()
            torch.cat(states, dim=1).square().mean().backward()
            gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        for name, gradient in gradients[1].items():
            assert_close(gradients[0][name], gradient, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)

    def test_no_gradient_enters_an_earlier_segment_but_its_memory_trains_keys_values_and_distances(self):
        model = decoder().model
        first, second = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[7, 8]])
        memory = model(first).past_key_values
        assert not any(layer.keys.requires_grad for layer in memory.layers)
        model(second, past_key_values=memory).last_hidden_state.square().sum().backward()
        rows = model.embed_tokens.weight.grad.abs().sum(-1)
        assert rows.nonzero().flatten().tolist() == [7, 8]
        with_memory = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        model(second, use_cache=False).last_hidden_state.square().sum().backward()
        for name, parameter in model.named_parameters():
            if any(word in name for word in ("k_proj", "v_proj", "r_proj", ".u", ".v")):
                assert not torch.allclose(with_memory[name], parameter.grad, atol=1e-4), name


class TestOneTextInPieces:
    @pytest.mark.parametrize("left", [0, 3])
    @pytest.mark.parametrize("form", FORMS)
    @torch.no_grad()
    def test_with_a_memory_of_all_of_it_is_the_text_in_one(self, form, left):
        model = decoder(form)
        ids, mask = pad(inputs(2, 11), left)
        mask[1] = 1
        real = mask.bool()
        whole = model(ids, mask, use_cache=False).logits
        for sizes in ([1] * ids.shape[1], [4, ids.shape[1] - 6, 2]):
            assert_close(read(model, ids, sizes, mask)[real], whole[real], **CLOSE)

    @pytest.mark.parametrize("left", [0, 2])
    @pytest.mark.parametrize(
        "patterns", [["sliding_window:4"], ["sliding_window:2", "sliding_window:5"], ["dilated:2,gap=3"]]
    )
    @pytest.mark.parametrize("form", ["transformer_xl", "transformer_xl_post", "rope", "relative_bias_sandwich"])
    @torch.no_grad()
    def test_windows_need_a_memory_of_their_past_alone(self, form, patterns, left):
        """Whatever the pieces, and however much longer than the memory the text is."""
        model = decoder(form, attention_patterns=patterns, memory_length=4)
        ids, mask = pad(inputs(2, 18), left)
        mask[1] = 1
        real = mask.bool()
        whole = model(ids, mask, use_cache=False).logits
        for sizes in ([1] * ids.shape[1], [7, 1, 2, ids.shape[1] - 10], [3] * 6 + [left] * (left > 0)):
            assert_close(read(model, ids, sizes, mask)[real], whole[real], **CLOSE)

    @pytest.mark.parametrize("patterns", [["local_global:2,tokens=1", "strided:3"], ["prefix_lm"], ["chunked:4"]])
    @torch.no_grad()
    def test_every_pattern_sees_through_the_memory(self, patterns):
        model = decoder(attention_patterns=patterns)
        ids = inputs(2, 13)
        assert_close(read(model, ids, [5, 1, 7]), model(ids, use_cache=False).logits, **CLOSE)

    @torch.no_grad()
    def test_both_backends_agree(self):
        ids, mask = pad(inputs(2, 9), 2)
        mask[1] = 1
        logits = []
        for backend in ("eager", "sdpa"):
            model = decoder("relative_bias_sandwich", memory_length=3)
            model.set_attn_implementation(backend)
            logits.append(read(model, ids, [4, 4, 3], mask)[mask.bool()])
        assert_close(*logits, **CLOSE)

    @torch.no_grad()
    def test_packed_documents_do_not_see_each_other_in_the_first_piece(self):
        model = decoder()
        ids, positions = inputs(1, 7), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
        packed = model(ids, position_ids=positions, use_cache=True).logits
        assert_close(packed[:, 3:], model(ids[:, 3:]).logits, **CLOSE)

    @torch.no_grad()
    def test_a_saved_model_goes_on_with_a_memory(self, tmp_path):
        model, ids = decoder(memory_length=3), inputs(2, 9)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.config.memory_length == 3
        memory = model(ids[:, :4]).past_key_values
        again = copy.deepcopy(memory)
        expected = model(ids[:, 4:], past_key_values=memory).logits
        assert_close(loaded(ids[:, 4:], past_key_values=again).logits, expected, **CLOSE)


class TestGeneration:
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
    @pytest.mark.parametrize("form", ["transformer_xl", "rope", "alibi_reordered", "shared_layers"])
    def test_with_a_memory_is_generation_without(self, form, options):
        model, (ids, mask) = decoder(form, initializer_range=0.4), pad(inputs(), 2)
        mask[1] = 1
        options = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False, **options}
        expected = model.generate(ids, use_cache=False, **options)
        assert torch.equal(model.generate(ids, **options), expected)

    def test_a_window_generates_past_its_memory(self):
        model = decoder(attention_patterns=["sliding_window:4"], memory_length=3, initializer_range=0.4)
        options = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(model.generate(inputs(), **options), model.generate(inputs(), use_cache=False, **options))

    def test_an_assistant_changes_no_token(self):
        """What it proposes and the model refuses is taken out of the memory again."""
        model, ids = decoder(initializer_range=0.4), inputs(batch=1)
        assistant = decoder(num_hidden_layers=1, memory_length=5)
        expected = model.generate(ids, max_new_tokens=9, do_sample=False)
        options = {"max_new_tokens": 9, "do_sample": False}
        assert torch.equal(model.generate(ids, assistant_model=assistant, **options), expected)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **options), expected)

    @pytest.mark.parametrize("beams", [1, 2])
    def test_a_pair_generates_with_a_memory_shorter_than_its_source(self, beams):
        fields = {**XL, "attention_patterns": ["sliding_window:4"], "memory_length": 3}
        config = tiny("encoder_decoder", decoder=fields, eos_token_id=None)
        model, (source, mask) = build(config, AutoModelForSeq2SeqLM), pad(inputs(2, 9), 0, 2)
        options = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": beams, "do_sample": False}
        expected = model.generate(source, use_cache=False, **options)
        assert torch.equal(model.generate(source, **options), expected)


class TestTheCache:
    @torch.no_grad()
    def test_it_is_a_stock_one_that_keeps_the_last_inputs(self):
        model, ids, seen = decoder(memory_length=5).model, inputs(2, 9), []
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        memory = model(ids).past_key_values
        assert type(memory) is DynamicCache
        assert memory.get_seq_length() == 9
        for layer, states in zip(memory.layers, seen):
            assert_close(layer.keys[:, 0], states[:, -5:])
            assert layer.values.numel() == 0

    @torch.no_grad()
    def test_its_rows_are_repeated_chosen_and_begun_again(self):
        model, ids = decoder(memory_length=5), inputs(2, 9)
        memory = model(ids[:, :6]).past_key_values
        expected = model(ids[:, 6:], past_key_values=copy.deepcopy(memory)).logits
        memory.batch_repeat_interleave(2)
        memory.reorder_cache(torch.tensor([3, 2, 1, 0]))
        memory.batch_select_indices(torch.tensor([2, 0]))
        assert_close(model(ids[:, 6:], past_key_values=memory).logits, expected, **CLOSE)
        memory.reset()
        assert_close(model(ids, past_key_values=memory).logits, model(ids).logits, **CLOSE)

    @pytest.mark.parametrize("is_training", [True, False])
    def test_it_is_made_where_it_is_asked_for(self, is_training):
        model = decoder().train(is_training)
        assert model(inputs(), use_cache=True).past_key_values.get_seq_length() == 7
        assert model(inputs(), use_cache=False).past_key_values is None
        plain = decoder(memory_length=0).train(is_training)
        assert (plain(inputs(), use_cache=True).past_key_values is None) is is_training
        with torch.no_grad():  # no step, whatever the mode
            assert plain(inputs(), use_cache=True).past_key_values.get_seq_length() == 7

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.filterwarnings("error:.*aching is incompatible")
    def test_checkpointing_keeps_it(self, use_reentrant):
        """Given to the model, the cache is told each segment once, and the gradients are those without checkpointing."""
        results, ids = [], inputs(2, 9)
        for is_checkpointed in (False, True):
            model = decoder("relative_bias_sandwich", memory_length=4).train()
            if is_checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            memory = DynamicCache(config=model.config)
            losses = [model(piece, labels=piece, past_key_values=memory).loss for piece in ids.split((5, 4), dim=1)]
            sum(losses).backward()
            assert memory.get_seq_length() == 9
            results.append({name: parameter.grad for name, parameter in model.named_parameters()})
        for name, gradient in results[0].items():
            assert_close(results[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)

    def test_it_lowers_the_loss_of_a_text_that_repeats_itself(self):
        """Trained on a second half that is the first, which only a memory shows."""
        torch.manual_seed(0)
        model = decoder(memory_length=6, num_hidden_layers=2, hidden_size=24).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for step in range(60):
            memory, ids = DynamicCache(config=model.config), inputs(32, 6, seed=step)
            model(ids, past_key_values=memory)
            loss = model(ids, labels=ids, past_key_values=memory).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss < 1.5
        assert model(ids, labels=ids, use_cache=False).loss > 2.5

    @pytest.mark.parametrize(
        "make",
        [
            lambda config: DynamicCache(),
            lambda config: StaticCache(config=config, max_cache_len=16),
            lambda config: DynamicCache(config=tiny("decoder", memory_length=3)),
            lambda config: DynamicCache(config=tiny("decoder", memory_length=4, num_hidden_layers=1)),
        ],
        ids=["unbounded", "static", "of another length", "of another depth"],
    )
    def test_another_cache_is_refused_by_field(self, make):
        model = decoder(memory_length=4)
        with pytest.raises(
            ValueError, match=r"`memory_length=4` asks for: make it by `DynamicCache\(config=model.config\)`"
        ):
            model(inputs(), past_key_values=make(model.config))

    def test_generation_with_a_static_cache_is_refused_by_field(self):
        with pytest.raises(
            ValueError, match=r"`memory_length=24` .*Static, quantized and unbounded caches hold no memory"
        ):
            decoder().generate(inputs(), max_new_tokens=3, cache_implementation="static")

    def test_a_memory_of_other_sequences_is_refused(self):
        model = decoder()
        memory = model(inputs(2)).past_key_values
        with pytest.raises(
            ValueError, match="remembers 2 sequences, 12 wide; this call has 3, 12 wide: begin other texts"
        ):
            model(inputs(3), past_key_values=memory)

    def test_a_pair_that_is_made_by_hand_works_but_where_it_would_forget_the_source(self):
        config = tiny("encoder_decoder", decoder={**XL, "memory_length": 24})
        model, source, target = build(config, AutoModelForSeq2SeqLM), inputs(2, 9), inputs(2, 6, seed=1)
        whole = model(source, decoder_input_ids=target, use_cache=False).logits
        cache = EncoderDecoderCache(DynamicCache(config=model.config.decoder), DynamicCache())
        pieces = [
            model(source, decoder_input_ids=piece, past_key_values=cache).logits for piece in target.split(4, dim=1)
        ]
        assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-4)
        forgetful = EncoderDecoderCache(*(DynamicCache(config=model.config.decoder) for _ in range(2)))
        with pytest.raises(
            ValueError, match=r"`past_key_values.cross_attention_cache` .* make it by `DynamicCache\(\)`"
        ):
            model(source, decoder_input_ids=target, past_key_values=forgetful)


@torch.no_grad()
def test_a_forward_without_a_cache_is_one_graph_and_one_program():
    model, (ids, mask) = decoder(), pad(inputs(), 2)
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    expected = model(**given).logits
    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(**given).logits, expected, rtol=1e-4, atol=1e-4)
    length = torch.export.Dim("length", min=2, max=20)
    dynamic = {"input_ids": {1: length}, "attention_mask": {1: length}, "use_cache": None}
    program = torch.export.export(model, (), given, dynamic_shapes=dynamic)
    assert_close(program.module()(**given)["logits"], expected, rtol=1e-4, atol=1e-4)
