"""What a form costs, by closed arithmetic over the fields of its config: no module is built, and torch is not needed.

Each function says of one part what `report.costs` counts on the meta device, and the two are equal for every form.
"""

from typing import Any, NamedTuple

from .costs import Costs, attention_flops, cache_dtype, cache_elements, stacks_of, text_length

# Of the activations that learn: how many
LEARNED_BY_ACTIVATION = {"prelu": 1, "xielu": 2}


class Part(NamedTuple):
    """What a part of a model adds up to; parts are added with `total`."""

    parameters: int = 0
    weights: int = 0  # of the linear maps that a token passes
    idle: int = 0  # parameters of the experts that a token does not use
    rare: int = 0  # what linear maps that not every token passes once add to `weights` times the length


def total(*parts: Part, times: int = 1) -> Part:
    """The sum of some parts, several times over."""
    return Part(*(times * sum(numbers) for numbers in zip(*parts, Part())))


def count_closed(config: Any, length: int | None = None, dtype: Any = None) -> Costs:
    """As `count_costs`, from the fields alone, in about a millisecond.

    Args:
        config: any config of the family.
        length: of the text in tokens, for the FLOPs. Default: `default_length(config)`.
        dtype: of the cache. Default: `cache_dtype(config)`.

    Raises:
        ValueError: for a length below 1.
    """
    length = text_length(config, length)
    stacks = stacks_of(config)
    source_size = stacks["encoder"].output_size if config.is_encoder_decoder else None
    parts, terms = [], 0
    for stack in stacks.values():
        layers, runs = layers_of(stack, source_size if stack.is_causal_stack else None, length)
        parts += [embeddings(stack), layers, norm(stack, stack.output_size) if stack.final_norm else Part()]
        # Layers that share weights are stored once, and a token passes them several times
        terms += (runs - 1) * length * layers.weights + runs * layers.rare
    last = list(stacks.values())[-1]
    parts.append(head(last, is_tied=config.tie_word_embeddings))
    if config.is_encoder_decoder and config.tie_encoder_decoder_embeddings:
        parts.append(Part(-last.vocab_size * last.embedding_size))
    whole = total(*parts)
    flops = 2 * (length * whole.weights + terms) + attention_flops(config, length)
    size = (dtype or cache_dtype(config)).itemsize
    cached = [elements * size for elements in cache_elements(config)]
    return Costs(whole.parameters, whole.parameters - whole.idle, flops / length, *cached)


def linear(inputs: int, outputs: int, has_bias: bool = False) -> Part:
    return Part(inputs * outputs + (outputs if has_bias else 0), inputs * outputs)


def norm(config: Any, size: int) -> Part:
    return Part(size * (2 if config.norm_type == "layer_norm" and config.norm_bias else 1))


def embeddings(config: Any) -> Part:
    """The table of tokens, token types, positions, and the way to the model's width."""
    size, scheme = config.embedding_size, config.position_embedding_type
    rows = config.vocab_size + config.type_vocab_size
    if scheme == "learned":
        rows += config.max_position_embeddings + config.position_offset
    parameters = rows * size
    if scheme == "axial":
        parameters += sum(rows * width for rows, width in zip(config.axial_shape, config.axial_dims))
    if scheme == "relative_bias":
        parameters += config.relative_attention_num_buckets * config.num_attention_heads
    if scheme == "transformer_xl":
        parameters += 2 * config.num_attention_heads * config.head_dim
    parts = [Part(parameters)]
    if config.embedding_norm:
        parts.append(norm(config, size))
    if size != config.hidden_size:
        parts.append(linear(size, config.hidden_size, has_bias=True))
    return total(*parts)


def layers_of(config: Any, source_size: int | None, length: int) -> tuple[Part, int]:
    """The stored layers of a stack, and how many times a token passes each.

    Args:
        source_size: width of the states that cross-attention reads; None for none. length: of the text in tokens.
    """
    runs = config.num_hidden_layers // (config.num_hidden_groups or config.num_hidden_layers)
    firsts = range(0, config.num_hidden_layers, runs)
    return total(*(layer(config, layer_idx, source_size, length) for layer_idx in firsts)), runs


def layer(config: Any, layer_idx: int, source_size: int | None, length: int) -> Part:
    branches = 2 if source_size is None else 3
    norms = branches * (2 if config.norm_placement == "sandwich" else 1)
    norms -= config.skip_first_norm and layer_idx == 0 and config.norm_placement in ("pre", "sandwich")
    parts = [total(norm(config, config.hidden_size), times=norms)]
    if config.layer_scale_init is not None:
        parts.append(Part(branches * config.hidden_size))
    parts += [projections(config, None), self_attention(config, config.pattern_of(layer_idx), length)]
    if source_size is not None:
        parts.append(projections(config, source_size))
    is_sparse = config.is_sparse_layer(layer_idx)
    parts.append(experts(config) if is_sparse else feed_forward(config, config.intermediate_size))
    return total(*parts)


def projections(config: Any, source_size: int | None) -> Part:
    """What self- and cross-attention have: q, k, v, o, norms of queries and keys, and sinks."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    source, biased = source_size or config.hidden_size, config.biased_projections
    parts = [
        linear(config.hidden_size, queries, "q" in biased),
        linear(source, keys, "k" in biased),
        linear(source, keys, "v" in biased),
        linear(queries, config.hidden_size, "o" in biased),
    ]
    if config.qk_norm is not None:
        parts += [norm(config, size) for size in normed_sizes(config)]
    if config.attention_sinks:
        parts.append(Part(config.num_attention_heads))
    return total(*parts)


def normed_sizes(config: Any) -> tuple[int, int]:
    """The widths at which queries and keys are normalised."""
    if config.qk_norm == "head":
        return config.head_dim, config.head_dim
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def self_attention(config: Any, pattern: Any, length: int) -> Part:
    """What a layer's pattern and positions add to, or take from, its projections."""
    queries = config.num_attention_heads * config.head_dim
    keys, biased = config.num_key_value_heads * config.head_dim, config.biased_projections
    parts = []
    if pattern.name == "lsh":  # a key is its token's query
        parts.append(total(linear(config.hidden_size, keys, "k" in biased), times=-1))
        if config.qk_norm is not None:
            parts.append(total(norm(config, normed_sizes(config)[1]), times=-1))
    if pattern.name == "local_global" and pattern.global_projections:
        query = linear(config.hidden_size, queries, "q" in biased)
        parts += [
            query,
            linear(config.hidden_size, keys, "k" in biased),
            linear(config.hidden_size, keys, "v" in biased),
        ]
        # Of global tokens alone; in a text without one, of a token whose result is left out
        parts.append(Part(rare=(max(1, min(pattern.tokens, length)) - length) * query.weights))
    if config.position_embedding_type == "transformer_xl":
        distance = linear(config.hidden_size, queries)
        # Both ways, a distance has two signs
        parts += [distance, Part(rare=0 if config.is_causal_stack else (length - 1) * distance.weights)]
    return total(*parts)


def feed_forward(config: Any, inner_size: int) -> Part:
    into = linear(config.hidden_size, inner_size, config.mlp_bias)
    out_of = linear(inner_size, config.hidden_size, config.mlp_bias)
    networks = [into, into, out_of] if config.gated_mlp else [into, out_of]
    return total(*networks, activation(config.hidden_act))


def activation(name: str) -> Part:
    return Part(LEARNED_BY_ACTIVATION.get(name, 0))


def experts(config: Any) -> Part:
    """The router, its experts, of which a token passes some, and those that all tokens share."""
    number, used, inner_size = config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size
    # In the fused layout one activation serves them all; what it learns is multiplied with tokens, as weights are
    learned, activations = (
        activation(config.hidden_act).parameters,
        number if config.experts_layout == "modulelist" else 1,
    )
    stored = total(feed_forward(config, inner_size), times=number)
    stored = total(stored, Part((activations - number) * learned, activations * learned))
    parts = [linear(config.hidden_size, number, config.router_bias)]
    idle = stored.parameters * (number - used) // number
    parts.append(Part(stored.parameters, stored.weights * used // number, idle))
    if config.num_shared_experts:
        parts.append(feed_forward(config, config.num_shared_experts * inner_size))
        if config.shared_expert_gate:
            parts.append(linear(config.hidden_size, 1))
    return total(*parts)


def head(config: Any, is_tied: bool) -> Part:
    """The language-model head; where it is tied, its matrix is the token table's."""
    size, parts = config.lm_head_size, []
    if config.lm_head_transform:
        has_bias = config.mlp_bias if config.head_bias is None else config.head_bias
        parts += [linear(config.output_size, size, has_bias), norm(config, size)]
        parts.append(activation(config.head_act or config.hidden_act))
    elif size != config.output_size:
        parts.append(linear(config.output_size, size))
    parts.append(linear(size, config.vocab_size, config.lm_head_bias))
    if is_tied:
        parts.append(Part(-size * config.vocab_size))
    return total(*parts)
