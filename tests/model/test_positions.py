"""Position schemes against their formulas, and against what each promises: shifts, reach, packing."""

import math

import pytest
import torch
from strategies import ROPES, rope_parameters
from tiny import build, inputs, pad, tiny
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from variform.model.attention import Attention
from variform.model.positions import (
    AlibiBias,
    AxialPositions,
    Distances,
    LearnedPositions,
    RelativeBias,
    RotaryEmbedding,
    SinusoidalPositions,
    TransformerXlPositions,
    alibi_slopes,
    count_positions,
    packed_documents,
    relative_position_bucket,
    rotate,
)

SIZE = 12


class TestLearned:
    def test_position_p_reads_row_p_plus_offset(self):
        table = LearnedPositions(tiny("encoder", position_embedding_type="learned", position_offset=2))
        nn.init.normal_(table.weight)
        assert table.weight.shape == (26, SIZE)
        assert_close(table(torch.tensor([[0, 23]])), table.weight[[2, 25]][None])

    @pytest.mark.parametrize("position", [24, -3])
    def test_a_position_outside_is_refused(self, position):
        table = LearnedPositions(tiny("encoder", position_embedding_type="learned", position_offset=2))
        nn.init.normal_(table.weight)
        with pytest.raises(ValueError, match=rf"`position_ids` reach .*{position}.*0 to 23"):
            table(torch.tensor([[position]]))


class TestAxial:
    def make(self, **fields):
        table = AxialPositions(tiny("encoder", position_embedding_type="axial", **fields))
        for weight in table.parameters():
            nn.init.normal_(weight)
        return table

    def test_a_position_is_its_row_beside_its_column(self):
        table = self.make(axial_shape=[4, 7], axial_dims=[5, 7])
        positions = torch.arange(28)[None]
        whole = torch.cat((table.rows[:, None].expand(-1, 7, -1), table.columns.expand(4, -1, -1)), dim=-1)
        assert_close(table(positions), whole.flatten(0, 1)[None])

    def test_tables_that_are_not_given_are_as_square_as_hold_all_positions(self):
        for longest, shape in ((1, [1, 1]), (24, [5, 5]), (26, [5, 6]), (4096, [64, 64])):
            config = tiny("encoder", position_embedding_type="axial", max_position_embeddings=longest, hidden_size=7)
            assert (config.axial_shape, config.axial_dims) == (shape, [3, 4])

    @pytest.mark.parametrize("position", [28, -1])
    def test_a_position_outside_is_refused(self, position):
        with pytest.raises(ValueError, match=rf"`position_ids` reach .*{position}.*`axial_shape=\[4, 7\]` .*0 to 27"):
            self.make(axial_shape=[4, 7])(torch.tensor([[position]]))


@pytest.mark.parametrize("exponent", ["2i/d", "2i/(d-2)"])
@pytest.mark.parametrize("layout", ["concatenated", "interleaved"])
@pytest.mark.parametrize("offset", [0, 2])
def test_sinusoids_are_the_formula(layout, exponent, offset):
    fields = {"sinusoidal_layout": layout, "sinusoidal_exponent": exponent, "position_offset": offset}
    scheme = SinusoidalPositions(tiny("encoder", position_embedding_type="sinusoidal", **fields))
    output = scheme(torch.tensor([[0, 3, 500]]))[0]
    denominator = SIZE if exponent == "2i/d" else SIZE - 2
    for row, position in zip(output, (0, 3, 500)):
        for i in range(SIZE // 2):
            angle = (position + offset) / 10000 ** (2 * i / denominator)
            places = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + SIZE // 2)
            assert math.isclose(row[places[0]], math.sin(angle), abs_tol=1e-6)
            assert math.isclose(row[places[1]], math.cos(angle), abs_tol=1e-6)


class TestRotary:
    @pytest.mark.parametrize("rope", [rope for rope in ROPES if rope != "proportional"])
    @pytest.mark.parametrize("length", [6, 40])
    def test_every_rope_type_is_that_of_llama(self, rope, length):
        """Past the trained length, too, where "dynamic" and "longrope" change their frequencies."""
        parameters = rope_parameters(rope, 8)
        ours = RotaryEmbedding(tiny("decoder", head_dim=8, rope_parameters=parameters), "full_attention")
        config = LlamaConfig(head_dim=8, max_position_embeddings=24, rope_parameters=rope_parameters(rope, 8))
        theirs = LlamaRotaryEmbedding(config)
        positions, states = torch.arange(length)[None], torch.zeros(1)
        for mine, other in zip(ours(states, positions), theirs(states, positions)):
            assert_close(mine, other, rtol=0, atol=1e-6)

    def test_proportional_leaves_the_low_frequencies_still(self):
        parameters = rope_parameters("proportional", 8, 0.5)
        cos, sin = RotaryEmbedding(tiny("decoder", head_dim=8, rope_parameters=parameters), "full_attention")(
            torch.zeros(1), torch.arange(5)[None]
        )
        angles = torch.arange(5)[:, None] * 100.0 ** -(torch.arange(0, 4, 2) / 8)
        still = torch.zeros(5, 2)
        assert_close(sin[0, :, :4], torch.cat((angles, still), dim=-1).sin())
        assert_close(cos[0, :, :4], torch.cat((angles, still), dim=-1).cos())

    def test_a_plane_turns_by_its_angle(self):
        parameters = {"rope_type": "default", "rope_theta": 20.0}
        rotary = RotaryEmbedding(tiny("decoder", rope_parameters=parameters), "full_attention")
        states = torch.randn(1, 1, 1, 4)
        turned = rotate(states, *rotary(states, torch.tensor([[3]])))[0, 0, 0]
        for i in range(2):
            plane = complex(states[0, 0, 0, i], states[0, 0, 0, i + 2])
            expected = plane * complex(math.cos(3 * 20 ** (-i / 2)), math.sin(3 * 20 ** (-i / 2)))
            assert math.isclose(turned[i], expected.real, abs_tol=1e-5)
            assert math.isclose(turned[i + 2], expected.imag, abs_tol=1e-5)

    @pytest.mark.parametrize("partial", [1.0, 0.5])
    def test_scores_depend_on_the_distance_alone(self, partial):
        parameters = rope_parameters("default", 8, partial)
        rotary = RotaryEmbedding(tiny("decoder", head_dim=8, rope_parameters=parameters), "full_attention")
        query, key = torch.randn(2, 1, 1, 1, 8).unbind(0)

        def score(q, k):
            at = [rotary(query, torch.tensor([[position]])) for position in (q, k)]
            return (rotate(query, *at[0]) * rotate(key, *at[1])).sum()

        assert_close(score(9, 4), score(14, 9), rtol=1e-4, atol=1e-5)
        assert not torch.isclose(score(9, 4), score(9, 5), atol=1e-4)

    def test_partial_rotation_passes_the_rest(self):
        parameters = rope_parameters("default", 8, 0.5)
        rotary = RotaryEmbedding(tiny("decoder", head_dim=8, rope_parameters=parameters), "full_attention")
        states = torch.randn(1, 2, 5, 8)
        turned = rotate(states, *rotary(states, torch.arange(5)[None]))
        assert_close(turned[..., 4:], states[..., 4:], rtol=0, atol=0)
        assert not torch.isclose(turned[:, :, 1:, :4], states[:, :, 1:, :4]).any()

    def test_each_layer_type_has_its_own(self):
        both = {"full_attention": rope_parameters("default", 4, theta=50.0)}
        both["sliding_attention"] = rope_parameters("default", 4, theta=9.0)
        config = tiny("decoder", rope_parameters=both, attention_patterns=["sliding_window:3", "full"])
        model = build(config)
        for layer_type, theta in (("full_attention", 50.0), ("sliding_attention", 9.0)):
            assert_close(model.rotary_emb[layer_type].inv_freq, torch.tensor([1.0, theta**-0.5]))


class TestRelativeBias:
    @pytest.mark.parametrize("is_causal", [True, False])
    @pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 16), (6, 20)])
    def test_buckets_are_those_of_t5(self, is_causal, num_buckets, max_distance):
        distance = torch.arange(-300, 301)
        found = relative_position_bucket(distance, is_causal, num_buckets, max_distance)
        expected = T5Attention._relative_position_bucket(distance, not is_causal, num_buckets, max_distance)
        assert_close(found, expected)

    @pytest.mark.parametrize("is_causal", [True, False])
    def test_distances_at_and_past_the_longest_share_a_bucket(self, is_causal):
        buckets = relative_position_bucket(torch.tensor([-16, -17, -999]), is_causal, 8, 16)
        assert len(set(buckets.tolist())) == 1

    def test_bias_reads_the_bucket_of_each_pair(self):
        config = tiny("decoder", position_embedding_type="relative_bias", relative_attention_num_buckets=8)
        scheme = RelativeBias(config, is_causal=True)
        nn.init.normal_(scheme.weight)
        queries, keys = torch.tensor([[4, 9]]), torch.tensor([[0, 3, 9]])
        bias = scheme(queries, keys)
        assert bias.shape == (1, 3, 2, 3)
        for q, query in enumerate(queries[0]):
            for k, key in enumerate(keys[0]):
                bucket = relative_position_bucket(key - query, True, 8, 128)
                assert_close(bias[0, :, q, k], scheme.weight[bucket])


class TestAlibi:
    def test_slopes_of_a_power_of_two(self):
        assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))

    def test_slopes_of_other_counts_are_filled_from_twice_the_power(self):
        assert_close(alibi_slopes(6), torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]).float())
        assert_close(alibi_slopes(3), torch.tensor([2**-4, 2**-8, 2**-2]).float())

    def test_bias_falls_with_the_distance(self):
        config = tiny("encoder", position_embedding_type="alibi", num_attention_heads=2)
        bias = AlibiBias(config)(torch.tensor([[3]]), torch.tensor([[0, 3, 5]]))
        assert_close(bias[0, :, 0], -torch.tensor([[3.0, 0, 2]]) * torch.tensor([[2**-4], [2**-8]]))


def xl_reference(attention, scheme, states, positions, hidden) -> torch.Tensor:
    """The formula, with a sine and a cosine of each pair's distance: `(batch, tokens, hidden_size)` of states as wide."""
    config = attention.config
    heads = (states.shape[1], -1, config.head_dim)
    query, key, value = (getattr(attention, f"{name}_proj")(states).unflatten(1, heads[:1]) for name in "qkv")
    query, key, value = (part.unflatten(-1, heads[1:]) for part in (query, key, value))
    groups = config.num_attention_heads // config.num_key_value_heads
    key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    distances = (positions[:, :, None] - positions[:, None, :]).double()
    frequencies = 10000.0 ** (-torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
    angles = distances[..., None] * frequencies
    waves = attention.r_proj(torch.cat((angles.sin(), angles.cos()), -1).float().double()).unflatten(-1, heads[1:])
    scores = torch.einsum("bqhd,bkhd->bhqk", query + scheme.u, key) * attention.scaling
    if config.attn_logit_softcapping is not None:
        scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
    scores = scores + torch.einsum("bqhd,bqkhd->bhqk", query + scheme.v, waves) * attention.scaling
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    if attention.sinks is not None:
        scores = torch.cat((scores, attention.sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    weights = scores.softmax(-1)[..., : states.shape[1]]
    return attention.o_proj(torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))


class TestTransformerXl:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_scale": 0.7},
            {"attn_logit_softcapping": 0.8, "attention_sinks": True},
        ],
    )
    @pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4], [3, 4, 9, 200, 201], [0, 1, 0, 1, 2]])
    @pytest.mark.parametrize("is_causal", [True, False])
    def test_outputs_and_gradients_are_those_of_the_formula(self, is_causal, positions, fields):
        """Positions may leave gaps, and distances are signed where a query sees ahead."""
        config = tiny("decoder", position_embedding_type="transformer_xl", **fields)
        config._attn_implementation = "eager"
        attention = Attention(config, 0, is_causal).double()
        scheme = TransformerXlPositions(config, is_causal).double()
        weights = [*attention.parameters(), *scheme.parameters()]
        for weight in weights:
            nn.init.normal_(weight, std=0.4)
        states, positions = torch.randn(2, 5, SIZE).double(), torch.tensor([positions])
        hidden = torch.ones(1, 5, 5).triu(1).bool() if is_causal else torch.zeros(1, 5, 5).bool()
        mask = torch.zeros(1, 1, 5, 5).masked_fill(hidden[:, None], torch.finfo(torch.float32).min)
        waves, index = scheme(positions, positions)
        distances = Distances(waves.double(), index)
        output, _ = attention(states, attention_mask=mask, distances=distances, query_biases=scheme.biases())
        expected = xl_reference(attention, scheme, states, positions, hidden)
        assert_close(output, expected, rtol=1e-6, atol=1e-6)
        found = torch.autograd.grad(output.square().sum(), weights)
        for gradient, right in zip(found, torch.autograd.grad(expected.square().sum(), weights)):
            assert_close(gradient, right, rtol=1e-4, atol=1e-5)

    def test_a_causal_stack_makes_no_waves_of_the_future_but_where_a_prefix_sees_it(self):
        scheme = TransformerXlPositions(tiny("decoder", position_embedding_type="transformer_xl"), is_causal=True)
        positions = torch.arange(6)[None]
        assert len(scheme(positions, positions).waves) == 6
        waves, index = scheme(positions, positions, sees_ahead=True)
        assert len(waves) == 11
        assert torch.equal(index[0, 0], torch.tensor([5, 4, 3, 2, 1, 0]))
        assert_close(waves[5], torch.cat((torch.zeros(SIZE // 2), torch.ones(SIZE // 2))))

    def test_a_prefix_sees_signed_distances(self):
        """A decoder whose prefix is all of the text is the encoder with its weights."""
        fields = {"position_embedding_type": "transformer_xl"}
        decoder = build(tiny("decoder", attention_patterns=["prefix_lm"], **fields))
        encoder = build(tiny("encoder", **fields))
        encoder.load_state_dict(decoder.state_dict())
        lengths = torch.full((2,), 7)
        assert_close(decoder(inputs(), prefix_lengths=lengths)[0], encoder(inputs())[0], rtol=1e-4, atol=1e-5)

    def test_global_rows_read_the_distances_too(self):
        """Where the projections of global tokens are those of the others, a form with them is the form without."""
        fields = {"position_embedding_type": "transformer_xl", "num_hidden_layers": 1}
        patterns = [f"local_global:2,tokens=2,global_projections={value}" for value in ("true", "false")]
        own, plain = (build(tiny("encoder", attention_patterns=[pattern], **fields)) for pattern in patterns)
        missing, _ = own.load_state_dict(plain.state_dict(), strict=False)
        assert all("_global" in name for name in missing)
        for name in "qkv":
            attention = own.layers[0].self_attn
            getattr(attention, f"{name}_proj_global").load_state_dict(getattr(attention, f"{name}_proj").state_dict())
        ids, mask = pad(inputs(2, 9), 2)
        mask[1] = 1
        real = mask.bool()
        assert_close(own(ids, mask)[0][real], plain(ids, mask)[0][real], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointing_gives_the_same_gradients(self, use_reentrant):
        results = []
        for is_checkpointed in (False, True):
            model = build(tiny("decoder", position_embedding_type="transformer_xl", num_hidden_groups=1)).train()
            if is_checkpointed:
                model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model(inputs(), use_cache=False)[0].square().sum().backward()
            results.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_length", [0, 4])
@pytest.mark.parametrize("scheme", ["rope", "relative_bias", "alibi", "transformer_xl"])
@torch.no_grad()
def test_positions_given_beside_a_cache_are_those_of_the_new_keys(scheme, memory_length):
    """The last token sees those of its own call alone, at the positions that were given, which leave a gap."""
    fields = {"position_embedding_type": scheme, "num_hidden_layers": 1, "attention_patterns": ["sliding_window:3"]}
    model = build(tiny("decoder", **fields, memory_length=memory_length))
    ids, positions = inputs(2, 8), torch.tensor([[5, 6, 20]])
    causal = torch.zeros(2, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
    alone = model(ids[:, 5:], causal, position_ids=positions, use_cache=False)[0]
    cache = model.new_cache()
    model(ids[:, :5], past_key_values=cache)
    found = model(ids[:, 5:], position_ids=positions, past_key_values=cache)[0]
    assert_close(found[:, -1], alone[:, -1], rtol=1e-4, atol=1e-5)


def test_positions_are_counted_over_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 0, 1, 2], [0, 0, 0, 0, 0]]
    assert count_positions(mask).tolist() == expected


class TestPackedDocuments:
    @pytest.mark.parametrize(
        ("positions", "documents"),
        [
            ([0, 1, 2, 3], None),
            ([5, 6, 7, 8], None),
            ([0, 1, 0, 1], [1, 1, 2, 2]),
            ([0, 0, 0, 1], [1, 2, 3, 3]),
            ([0, 1, 2, 1], [1, 1, 1, 2]),
            ([0, 1, 5, 6], [1, 1, 2, 2]),
        ],
    )
    def test_a_document_starts_where_a_position_does_not_follow(self, positions, documents):
        found = packed_documents(torch.tensor([positions]), None)
        assert (found if found is None else found[0].tolist()) == documents

    @pytest.mark.parametrize(
        ("positions", "mask", "documents"),
        [
            ([0, 0, 0, 1], [0, 0, 1, 1], None),
            ([0, 1, 0, 0], [1, 1, 0, 0], None),
            ([0, 1, 0, 2], [1, 1, 0, 1], None),
            ([0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 2]),
            ([0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 2, 2]),
        ],
    )
    def test_padding_neither_starts_nor_ends_one(self, positions, mask, documents):
        found = packed_documents(torch.tensor([positions]), torch.tensor([mask]))
        assert (found if found is None else found[0].tolist()) == documents


@pytest.mark.parametrize("scheme", ["rope", "relative_bias", "alibi", "transformer_xl", "none"])
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_relative_schemes_do_not_see_a_shift(shape, scheme):
    model = build(tiny(shape, position_embedding_type=scheme))
    positions = torch.arange(7)[None]
    shifted = model(inputs(), position_ids=positions + 9)[0]
    assert_close(shifted, model(inputs(), position_ids=positions)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "scheme", ["learned", "axial", "sinusoidal", "rope", "relative_bias", "alibi", "transformer_xl"]
)
@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_every_scheme_sees_the_order(shape, scheme):
    """The last token's state changes when the tokens before it change places."""
    model = build(tiny(shape, position_embedding_type=scheme, num_hidden_layers=1))
    ids = torch.tensor([[3, 4, 5, 6]])
    swapped = ids[:, [1, 0, 2, 3]]
    assert not torch.allclose(model(ids)[0][:, -1], model(swapped)[0][:, -1], atol=1e-3)


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize("scheme", ["none", "rope", "relative_bias", "alibi", "transformer_xl", "learned"])
def test_a_window_hides_what_lies_beyond(shape, scheme):
    """One layer, window 2: causal, the token itself and the one before; both ways, two on each side."""
    config = tiny(shape, position_embedding_type=scheme, attention_patterns=["sliding_window:2"], num_hidden_layers=1)
    model = build(config)
    ids = inputs(1, 9)
    base = model(ids)[0]
    reach = range(-1, 1) if shape == "decoder" else range(-2, 3)
    for changed in range(9):
        other = ids.clone()
        other[0, changed] = 3 + (ids[0, changed] - 2) % 16
        moved = (model(other)[0] - base).abs().amax(-1)[0] > 1e-5
        assert moved.tolist() == [changed - query in reach for query in range(9)]
