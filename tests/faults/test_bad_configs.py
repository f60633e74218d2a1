"""Config files that would stop the machine, run code from elsewhere, or say what no config may: refused by field, at once."""

import copy
import json
import time

import pytest
from tiny import CONFIGS, build, tiny
from transformers import AutoConfig, AutoModel

from variform.loading import load_strictly
from variform.model import limits

SHAPES = list(CONFIGS)
ROOM = 5.0  # seconds of this process, for what takes less than one on an idle machine


def stored(shape, **fields):
    """What the config.json of a tiny model holds, with `fields` in it."""
    return {**json.loads(tiny(shape).to_json_string()), **fields}


def load(folder, values):
    text = values if isinstance(values, str) else json.dumps(values)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return AutoConfig.from_pretrained(folder)


def within(values, shape, side):
    """`values` as fields of the form or, for a pair, of one of its stacks."""
    if shape != "encoder_decoder":
        return values
    stack = {name: value for name, value in stored(shape)[side].items() if name != "router_aux_loss_coef"}
    return {side: {**stack, **values}}


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("shape", SHAPES)
class TestBombs:
    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"num_hidden_layers": 10**6}, "`num_hidden_layers=1000000` is more than 4096"),
            ({"vocab_size": 10**13}, "`vocab_size=10000000000000`.* make more than 1e\\+13 parameters"),
            ({"hidden_size": 10**400, "head_dim": 4}, "parameters"),
            ({"num_experts": 10**12}, "`num_experts=1000000000000` make more than"),
            ({"attention_patterns": ["full"] * 40_000}, "`attention_patterns` has 40000 entries, more than 4096"),
            ({"origin": {"model_type": "x" * 10, "junk": [0] * 60_000}}, "origin"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_are_refused_by_field_in_no_time(self, shape, side, fields, named, tmp_path):
        start = time.process_time()
        with pytest.raises(ValueError, match=named):
            load(tmp_path, stored(shape, **within(fields, shape, side)))
        assert time.process_time() - start < ROOM

    def test_limits_can_be_lifted(self, shape, side, tmp_path, monkeypatch):
        fields = within({"num_hidden_layers": limits.MOST_LAYERS + 1}, shape, side)
        with pytest.raises(ValueError, match="set VARIFORM_LIMITS=off if it is meant"):
            load(tmp_path, stored(shape, **fields))
        monkeypatch.setenv("VARIFORM_LIMITS", "off")
        config = load(tmp_path, stored(shape, **fields))
        assert getattr(config, side, config).num_hidden_layers == limits.MOST_LAYERS + 1


@pytest.mark.parametrize("shape", SHAPES)
class TestFiles:
    def test_fifty_megabytes_of_an_unknown_key_are_refused_in_no_time(self, shape, tmp_path):
        start = time.process_time()
        with pytest.raises(ValueError, match="`junk` is not a field"):
            load(tmp_path, stored(shape, junk="x" * 50_000_000))
        assert time.process_time() - start < ROOM

    def test_more_labels_than_there_can_be_are_refused(self, shape, tmp_path):
        with pytest.raises(ValueError, match="`num_labels=1000000000` is more than 10,000,000"):
            load(tmp_path, stored(shape, num_labels=10**9))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"_x": ' + "[" * 10_000 + "]" * 10_000 + "}", "RecursionError"),
            ('{"hidden_size": 12,', "JSONDecodeError"),
            ("", "JSONDecodeError"),
            ("[1]", "a JSON object of fields, got a list"),
        ],
        ids=["nested", "truncated", "empty", "list"],
    )
    def test_one_that_is_no_config_is_named(self, shape, text, message, tmp_path):
        build(tiny(shape)).save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"{tmp_path}.*config\.json.*{message}"):
            load_strictly(AutoModel, tmp_path)

    def test_one_that_is_not_there_is_named(self, shape, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"{tmp_path / shape}/config\.json is not there"):
            load_strictly(AutoModel, tmp_path / shape)

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
    def test_a_number_that_is_none_is_refused_by_field(self, shape, number, tmp_path):
        text = json.dumps(stored(shape)).replace('"initializer_range": 0.3', f'"initializer_range": {number}')
        assert number in text
        with pytest.raises(ValueError, match=r"`initializer_range=-?(nan|inf)` must be a finite number"):
            load(tmp_path, text)

    @pytest.mark.parametrize("version", ["5.0.0", "5.20.0", "99.0.0"])
    def test_what_other_releases_of_the_platform_write_loads(self, shape, version, tmp_path):
        """Keys that transformers puts into configs, or did, and generation's names."""
        keys = {"transformers_version": version, "torch_dtype": "float16", "_attn_implementation_autoset": True}
        keys |= {"attn_implementation": None, "_name_or_path": "me/model", "name_or_path": "me/model", "top_k": 50}
        keys |= {"task_specific_params": None, "bad_words_ids": None, "_commit_hash": None, "num_labels": 2}
        config = load(tmp_path, stored(shape, **keys))
        assert config.model_type == tiny(shape).model_type


BACKEND_KEYS = [
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
]


@pytest.mark.parametrize("shape", SHAPES)
class TestCodeFromElsewhere:
    @pytest.mark.parametrize("key", BACKEND_KEYS)
    @pytest.mark.parametrize("value", ["me/kernels", "paged|me/kernels:attend", {"": "me/kernels"}], ids=str)
    def test_a_backend_that_names_a_repo_is_refused(self, shape, key, value, tmp_path):
        with pytest.raises(ValueError, match=f"`{key}=.*me/kernels.*` would run the code of a repo"):
            load(tmp_path, stored(shape, **{key: value}))

    def test_so_it_is_in_a_stack_of_a_pair(self, shape, tmp_path):
        if shape == "encoder_decoder":
            fields = within({"_attn_implementation_internal": "me/kernels"}, shape, "decoder")
            with pytest.raises(ValueError, match=r"`decoder\._attn_implementation_internal='me/kernels'`"):
                load(tmp_path, stored(shape, **fields))

    def test_the_caller_may_name_one(self, shape, tmp_path):
        """Which fails for want of the package that fetches kernels, not for the config."""
        build(tiny(shape)).save_pretrained(tmp_path)
        with pytest.raises((ImportError, OSError, ValueError)) as error:
            AutoModel.from_pretrained(tmp_path, attn_implementation="me/kernels")
        assert "would run the code" not in str(error.value)

    @pytest.mark.parametrize("side", ["", "encoder", "decoder"])
    def test_trust_is_not_for_a_config_to_give(self, shape, side, tmp_path):
        trust = {"trust_remote_code": True}
        if side == "" or shape == "encoder_decoder":
            with pytest.raises(ValueError, match="`trust_remote_code` is not a field"):
                load(tmp_path, stored(shape, **(within(trust, shape, side) if side else trust)))

    def test_an_auto_map_of_elsewhere_moves_nothing_where_the_family_is_imported(self, shape, tmp_path):
        model = build(tiny(shape))
        model.save_pretrained(tmp_path)
        values = json.loads((tmp_path / "config.json").read_text())
        values["auto_map"] = dict.fromkeys(values["auto_map"], "../evil/mod.Evil")
        (tmp_path / "config.json").write_text(json.dumps(values))
        for trust in (None, True, False):
            loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=trust)
            assert type(loaded) is type(model)

    def test_an_auto_map_inside_a_pair_is_dropped(self, shape, tmp_path):
        if shape == "encoder_decoder":
            fields = within({"auto_map": {"AutoModel": "../evil/mod.Evil"}}, shape, "encoder")
            config = load(tmp_path, stored(shape, **fields))
            assert "evil" not in json.dumps(copy.deepcopy(config.to_dict()))


@pytest.mark.parametrize(
    ("fields", "both"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, ["num_experts_per_tok=5", "num_experts=4"]),
        ({"num_experts": 4, "num_experts_per_tok": 0}, ["num_experts_per_tok=0", "num_experts=4"]),
        ({"mlp_layer_types": ["sparse"]}, ["num_experts=0", "mlp_layer_types="]),
        ({"num_experts": 4, "router_aux_loss_coef": -0.1}, ["router_aux_loss_coef=-0.1", "0 (off)"]),
        ({"num_experts": 4, "expert_capacity": 0}, ["expert_capacity=0", "at least 1 token"]),
        ({"num_experts": 4, "expert_capacity_factor": 0.0}, ["expert_capacity_factor=0.0", "above 0"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_that_cannot_be_are_refused_by_both_fields(shape, fields, both):
    belongs_to_pair = shape == "encoder_decoder" and "router_aux_loss_coef" in fields
    with pytest.raises(ValueError) as error:
        tiny(shape, **(fields if shape != "encoder_decoder" or belongs_to_pair else {"decoder": fields}))
    if not belongs_to_pair:
        assert all(part in str(error.value) for part in both)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"hiden_size": 12}, "`hiden_size` is not a field .*did you mean `hidden_size`"),
        ({"hidden_size": "12"}, "`hidden_size='12'` has a wrong type"),
        ({"num_hidden_layers": -3}, "`num_hidden_layers=-3` must be at least 1"),
        ({"num_key_value_heads": 2}, "`num_key_value_heads=2` does not divide `num_attention_heads=3`"),
        ({"hidden_act": "nope"}, "`hidden_act='nope'` is not one of"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1.0}}, "rope_type'.='nope'` is not one of"),
        ({"pad_token_id": 19}, "`pad_token_id=19` is outside the vocabulary: `vocab_size=19`"),
        ({"attention_patterns": ["sliding_window:99"]}, "`window=99` is wider than `max_position_embeddings=24`"),
        ({"attention_dropout": 1.5}, r"`attention_dropout=1.5` is a probability: it must lie in \[0, 1\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_field_that_cannot_be_is_refused_in_a_file_too(shape, fields, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        load(tmp_path, stored(shape, **(within(fields, shape, "decoder") if "pad_token_id" not in fields else fields)))
