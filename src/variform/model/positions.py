"""Position schemes. Each may add to the embeddings, rotate queries and keys, or bias the scores.

Every scheme is driven by explicit position ids, so that padding, packing and caches are right for all of them at once.
Legend: B batch (1 where rows agree), S sequence, Q queries, K keys, H heads, D head_dim.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.utils import is_torchdynamo_compiling


class LearnedPositions(nn.Module):
    """A table of one vector a position (BERT, GPT-2). Adds to the embeddings.

    The table has `max_position_embeddings + position_offset` rows; position p reads row p + `position_offset`.
    """

    def __init__(self, config):
        super().__init__()
        rows = config.max_position_embeddings + config.position_offset
        self.weight = nn.Parameter(torch.empty(rows, config.embedding_size))
        self.offset = config.position_offset
        self.max_length = config.max_position_embeddings

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """`(B, S)` positions -> `(B, S, embedding_size)`.

        Raises:
            ValueError: if a position lies outside the table (on CPU; an accelerator reports it asynchronously).
        """
        rows = position_ids + self.offset if self.offset else position_ids
        if is_torchdynamo_compiling():
            return nn.functional.embedding(rows, self.weight)
        try:
            return nn.functional.embedding(rows, self.weight)
        except IndexError as error:
            raise ValueError(
                f"`position_ids` reach {int(position_ids.max())} (lowest {int(position_ids.min())}), but the learned table "
                f"holds positions 0 to {self.max_length - 1} (`max_position_embeddings={self.max_length}`): shorten the "
                "sequence, or choose `position_embedding_type='rope'`, which has no table."
            ) from error


class AxialPositions(nn.Module):
    """Two small tables in place of a long one (Reformer, arXiv:2001.04451, as in its code). Adds to the embeddings.

    Position p has vector `p // columns` of the one beside vector `p % columns` of the other: of n positions, tables of about
    2 * sqrt(n) rows.

    Args:
        config: reads `axial_shape`, rows of the two, and `axial_dims`, their widths.
    """

    def __init__(self, config):
        super().__init__()
        self.shape = config.axial_shape
        self.rows, self.columns = (
            nn.Parameter(torch.empty(length, size)) for length, size in zip(config.axial_shape, config.axial_dims)
        )

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """`(B, S)` positions -> `(B, S, embedding_size)`.

        Raises:
            ValueError: if a position lies outside the tables (on CPU; an accelerator reports it asynchronously).
        """
        row, column = position_ids // self.shape[1], position_ids % self.shape[1]
        right = nn.functional.embedding(column, self.columns)
        if is_torchdynamo_compiling():
            return torch.cat((nn.functional.embedding(row, self.rows), right), dim=-1)
        try:
            return torch.cat((nn.functional.embedding(row, self.rows), right), dim=-1)
        except IndexError as error:
            raise ValueError(
                f"`position_ids` reach {int(position_ids.max())} (lowest {int(position_ids.min())}), but the tables of "
                f"`axial_shape={self.shape}` hold positions 0 to {math.prod(self.shape) - 1}: shorten the sequence, or choose "
                "`position_embedding_type='rope'`, which has no table."
            ) from error


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines (Vaswani et al., arXiv:1706.03762, sec. 3.5). Adds to the embeddings; no longest length.

    Args:
        config: reads `embedding_size`, `position_offset`, `sinusoidal_layout` (all sines first, or alternating) and
            `sinusoidal_exponent` (2i/d, or fairseq's 2i/(d-2), in which the last frequency is exactly 1/10000).
    """

    def __init__(self, config):
        super().__init__()
        self.size = config.embedding_size
        self.offset = config.position_offset
        self.is_interleaved = config.sinusoidal_layout == "interleaved"
        self.steps = self.size // 2 - (config.sinusoidal_exponent == "2i/(d-2)")

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """`(B, S)` positions -> `(B, S, embedding_size)` float32."""
        waves = sines_and_cosines(position_ids + self.offset, self.size // 2, self.steps)
        return torch.stack(waves, dim=-1).flatten(-2) if self.is_interleaved else torch.cat(waves, dim=-1)


def sines_and_cosines(positions: torch.Tensor, count: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sines and the cosines of `positions` times `count` falling frequencies, `10000 ** (-i / steps)`.

    Args:
        positions: integers of any shape, also negative.

    Returns:
        Two tensors `(*positions.shape, count)` in float32.
    """
    # float64 where it exists: at position 500 a float32 angle is off by 3e-5
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    numbers = torch.arange(count, device=positions.device, dtype=dtype)
    angles = positions[..., None] * torch.exp(numbers * (-math.log(10000.0) / steps))
    return angles.sin().float(), angles.cos().float()


class RotaryEmbedding(nn.Module):
    """Rotation of queries and keys by their positions (RoFormer, arXiv:2104.09864), in every rope type of transformers.

    Args:
        config: reads `rope_parameters head_dim max_position_embeddings`.
        layer_type: whose rope parameters to use, where they differ by layer type.
    """

    def __init__(self, config, layer_type: str = "full_attention"):
        super().__init__()
        # transformers' rope functions read one flat dict from a config
        parameters = config.rope_parameters_of(layer_type)
        if parameters is not config.rope_parameters:
            config = copy.copy(config)
            config.rope_parameters = parameters
        self.config = config
        self.rope_type = parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        rope_init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rope_init(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `theta ** (-2i / d)` over the rotated part of a head, and the factor on cos and sin."""
        size = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, size, 2, dtype=torch.float, device=device) / size
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, S)` positions -> cos and sin `(B, S, rotated)`, in the dtype of `hidden_states`."""
        angles = position_ids[:, :, None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first channels of each head, as many as `cos` has; the rest pass (partial rotation).

    Args:
        states: queries or keys `(B, H, S, D)`. cos, sin: `(B, 1, S, rotated)`.
    """
    rotated = cos.shape[-1]
    if rotated == states.shape[-1]:
        return states * cos + rotate_half(states) * sin
    turned, passed = states[..., :rotated], states[..., rotated:]
    return torch.cat((turned * cos + rotate_half(turned) * sin, passed), dim=-1)


def rotate_half(states: torch.Tensor) -> torch.Tensor:
    """A quarter turn in each plane (i, i + D/2): `(a, b)` becomes `(-b, a)`."""
    half = states.shape[-1] // 2
    return torch.cat((-states[..., half:], states[..., :half]), dim=-1)


def relative_position_bucket(
    distance: torch.Tensor, is_causal: bool, num_buckets: int, max_distance: int
) -> torch.Tensor:
    """Bucket of a key-minus-query distance: exact when near, logarithmic when far (T5, arXiv:1910.10683, sec. 2.1).

    Args:
        distance: int64, in tokens, of any shape; negative when the key lies in the past.
        is_causal: all buckets serve the past; else half serve each side.

    Returns:
        int64 in `[0, num_buckets)`; distances of `max_distance` and more share a side's last bucket.
    """
    if not is_causal:
        num_buckets //= 2
        near = relative_position_bucket(-distance.abs(), True, num_buckets, max_distance)
        return near + (distance > 0) * num_buckets
    distance = -distance.clamp(max=0)
    exact = num_buckets // 2
    ratio = torch.log(distance.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    far = exact + (ratio * (num_buckets - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


class RelativeBias(nn.Module):
    """A learned score bias for each head and bucket of distances (T5), shared by all layers of a stack."""

    def __init__(self, config, is_causal: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.relative_attention_num_buckets, config.num_attention_heads))
        self.is_causal = is_causal
        self.max_distance = config.relative_attention_max_distance

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """`(B, Q)` and `(B, K)` positions -> `(B, H, Q, K)`."""
        distance = key_positions[:, None, :] - query_positions[:, :, None]
        return nn.functional.embedding(self._bucket(distance), self.weight).permute(0, 3, 1, 2)

    def table(self, length: int) -> torch.Tensor:
        """`(H, columns)`: the biases that pairs of places of a text of `length` tokens can have."""
        return self.weight.t()

    def column(self, query_places: torch.Tensor, key_places: torch.Tensor) -> torch.Tensor:
        """The column of the table for each pair; the places broadcast against each other."""
        return self._bucket(key_places - query_places)

    def _bucket(self, distance: torch.Tensor) -> torch.Tensor:
        return relative_position_bucket(distance, self.is_causal, self.weight.shape[0], self.max_distance)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """One slope a head (ALiBi, arXiv:2108.12409, sec. 3): `2 ** (-8h / n)`; other counts of heads than powers of two are
    filled with every second slope of twice the power."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2 ** (-8 * (2 * head + 1) / (2 * power)) for head in range(num_heads - power)]
    return torch.tensor(slopes)


class AlibiBias(nn.Module):
    """A penalty on the score in proportion to the distance, with a fixed slope a head (ALiBi, arXiv:2108.12409).

    Both ways, the distance is absolute.
    """

    def __init__(self, config):
        super().__init__()
        self.slopes = nn.Buffer(alibi_slopes(config.num_attention_heads), persistent=False)

    def forward(self, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
        """`(B, Q)` and `(B, K)` positions -> `(B, H, Q, K)`."""
        distance = (key_positions[:, None, None, :] - query_positions[:, None, :, None]).abs()
        return distance * -self.slopes[:, None, None]

    def table(self, length: int) -> torch.Tensor:
        """`(H, length)`: the bias of each distance."""
        return torch.arange(length, device=self.slopes.device) * -self.slopes[:, None]

    def column(self, query_places: torch.Tensor, key_places: torch.Tensor) -> torch.Tensor:
        """The column of the table for each pair; the places broadcast against each other."""
        return (key_places - query_places).abs()


class Distances(NamedTuple):
    """How far apart queries and keys are, as Transformer-XL's layers read it: waves, and which of them each pair reads."""

    waves: torch.Tensor  # (L, hidden_size), of L distances in a row
    numbers: torch.Tensor  # (B, Q, K) int64, into the waves


class TransformerXlPositions(nn.Module):
    """Scores that know the distance, by content and by position (Transformer-XL, arXiv:1901.02860, sec. 3.3).

    `score(i, j) = [(q_i + u) . k_j + (q_i + v) . (W_r R_{i-j})] * scale`, where `R_d` holds the sines, then the cosines, of
    `d * 10000 ** (-2t / hidden_size)`. Both ways, distances are signed. `u` and `v` are learned, here, for all layers of the
    stack; `W_r` is each layer's own (`r_proj`).

    Differs from the paper's code: no dropout on `R` and no longest distance. With soft-capping, the cap is on the first term,
    as on any score, and the second joins after it, as any position bias does.
    """

    def __init__(self, config, is_causal: bool):
        super().__init__()
        self.u = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.v = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        self.size = config.hidden_size
        self.is_causal = is_causal

    def forward(
        self, query_positions: torch.Tensor, key_positions: torch.Tensor, sees_ahead: bool = False
    ) -> Distances:
        """`(B, Q)` and `(B, K)` positions -> the distances from queries to keys.

        Traced, when shapes alone are known, positions are taken to rise by at most one, as counted ones do.

        Args:
            sees_ahead: whether a causal stack sees keys ahead of the query, as in a prefix. Else their distance is taken for 0.
        """
        most = key_positions.shape[1] - 1
        lowest, highest = -most, most
        if not is_torchdynamo_compiling() and not torch.jit.is_tracing():
            falls = (key_positions[:, 1:] < key_positions[:, :-1]).any()
            found = [*query_positions.aminmax(), *key_positions.aminmax(), falls]
            # trf-ignore: TRF056 (not traced: the branch above)
            first_query, last_query, first_key, last_key, falls = torch.stack(found).tolist()
            lowest, highest = first_query - last_key, last_query - first_key
            sees_ahead = sees_ahead or falls > 0
        if self.is_causal and not sees_ahead:
            lowest, highest = 0, max(highest, 0)
        waves = sines_and_cosines(
            torch.arange(lowest, highest + 1, device=key_positions.device), self.size // 2, self.size // 2
        )
        distances = query_positions[:, :, None] - key_positions[:, None, :]
        return Distances(torch.cat(waves, dim=-1), distances.clamp(lowest, highest) - lowest)

    def biases(self) -> torch.Tensor:
        """`(2, H, D)`: u and v, as one tensor that the layers are handed."""
        return torch.stack((self.u, self.v))


def distance_scores(query: torch.Tensor, waves: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The products of queries and projected waves, for each pair its own distance: the "relative shift" of
    arXiv:1901.02860, app. B, for distances in any order.

    Args:
        query: `(B, H, Q, D)`. waves: `(L, H, D)`, of L distances. numbers: `(B or 1, Q, K)`, below L.

    Returns:
        `(B, H, Q, K)`.
    """
    by_distance = torch.matmul(query, waves.permute(1, 2, 0))  # (B, H, Q, L)
    return by_distance.gather(-1, numbers[:, None].expand(*query.shape[:2], -1, -1))


class PositionHooks(NamedTuple):
    """The modules through which a stack's position scheme acts; None where the scheme does not act so."""

    add: nn.Module | None = None  # (B, S) -> (B, S, embedding_size), onto the embeddings
    rotate: nn.ModuleDict | None = None  # a layer type's (B, S) -> cos, sin, onto queries and keys
    bias: nn.Module | None = (
        None  # (B, Q), (B, K) -> (B, H, Q, K), onto the scores; also as a table with a column a pair
    )
    relate: nn.Module | None = None  # (B, Q), (B, K) -> distances, which each layer's own queries meet


def make_position_hooks(config, is_causal: bool) -> PositionHooks:
    """The hooks of `config.position_embedding_type`."""
    scheme = config.position_embedding_type
    if scheme == "learned":
        return PositionHooks(add=LearnedPositions(config))
    if scheme == "axial":
        return PositionHooks(add=AxialPositions(config))
    if scheme == "sinusoidal":
        return PositionHooks(add=SinusoidalPositions(config))
    if scheme == "rope":
        rotary = {name: RotaryEmbedding(config, name) for name in sorted(set(config.layer_types))}
        return PositionHooks(rotate=nn.ModuleDict(rotary))
    if scheme == "relative_bias":
        return PositionHooks(bias=RelativeBias(config, is_causal))
    if scheme == "alibi":
        return PositionHooks(bias=AlibiBias(config))
    if scheme == "transformer_xl":
        return PositionHooks(relate=TransformerXlPositions(config, is_causal))
    return PositionHooks()


def count_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions counted from a 2-D mask `(batch, slots)`: the first real token of a row is 0; padding before it, too."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def key_positions(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    seen: int | torch.Tensor,
    num_keys: int,
    offset: int,
) -> torch.Tensor:
    """Positions of the keys in a cache, in line with the positions of the queries.

    In a first call the first keys are the queries' own. Later, keys are counted over the real tokens, or over the slots
    where no mask tells them apart, and shifted so that the last query falls on its own key.

    Args:
        attention_mask: `(B, slots)`, 1 for real tokens, or None. position_ids: `(B, Q)`. seen: tokens before these.
        num_keys, offset: how many keys the layer attends to, and the slot of the first.

    Returns:
        `(B, num_keys)` int64.
    """
    if isinstance(seen, int) and seen == 0:
        return nn.functional.pad(position_ids, (0, num_keys - position_ids.shape[1]))
    keys = torch.arange(offset, offset + num_keys, device=position_ids.device)[None]
    last_key = seen + position_ids.shape[1] - 1
    if attention_mask is not None and attention_mask.ndim == 2:
        counted = count_positions(attention_mask.to(keys.device))
        keys = counted[:, keys[0].clamp(max=counted.shape[1] - 1)]
        if isinstance(last_key, int):
            last_key = counted[:, last_key : last_key + 1]
        else:
            last_key = counted[:, last_key.to(keys.device).view(1)]
    return keys + (position_ids[:, -1:] - last_key)


def packed_documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Document number of each token where explicit positions restart inside a row; None if every row is one document.

    A real token starts a document if its position does not follow the one before it; after padding, if it does not rise.

    Args:
        position_ids: `(B, S)`. attention_mask: `(B, S or more)`, 1 for real tokens, or None for all real.

    Returns:
        `(B, S)` int64 counted from 1, or None.
    """
    step = position_ids.diff(dim=-1)
    if attention_mask is None:
        starts = step != 1
    else:
        real = attention_mask[:, : position_ids.shape[1]].bool()
        starts = real[:, 1:] & torch.where(real[:, :-1], step != 1, step <= 0)
        # the first real token of a row opens no second document
        starts &= real[:, :-1].cumsum(-1) > 0
    if not is_torchdynamo_compiling() and not torch.jit.is_tracing() and not starts.any():
        return None
    return nn.functional.pad(starts.long(), (1, 0)).cumsum(-1) + 1
