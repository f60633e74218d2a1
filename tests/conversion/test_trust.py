"""A checkpoint of somebody else's makes this machine neither run code that nobody has read nor read files elsewhere."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import build, tiny
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import variform
from variform.conversion.checkpoint import Checkpoint
from variform.conversion.trust import check_folder, check_remote_code, refuse_foreign_code

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path):
    build(tiny("decoder"), AutoModelForCausalLM).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def put(folder, path, value):
    """Sets an entry of a folder's config, by the keys that lead to it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    inner = config
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


FOREIGN = {
    "trust_remote_code": (["trust_remote_code"], True),
    "nested trust_remote_code": (["text_config", "trust_remote_code"], True),
    "nested auto_map": (["encoder", "auto_map"], {"AutoConfig": "evil.Config"}),
    "auto_map of another repo": (["auto_map", "AutoModel"], "someone/else--modeling.Model"),
    "auto_map out of the folder": (["auto_map", "AutoModel"], "../evil/modeling.Model"),
    "tokenizer out of the folder": (["auto_map", "AutoTokenizer"], ["../evil.Slow", None]),
    "kernels": (["_attn_implementation"], "someone/kernels"),
    "kernels behind a name": (["_attn_implementation_internal"], "someone/kernels:flash"),
    "kernels by the public name": (["attn_implementation"], "someone/kernels@main"),
    "kernels of experts": (["experts_implementation"], "someone/kernels"),
    "kernels of a part": (["vision", "layers", "_attn_implementation"], "someone/kernels"),
    "kernels by part": (["attn_implementation", "encoder"], "someone/kernels"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_config_that_would_run_code_from_elsewhere_is_refused_by_key(name, folder):
    path, value = FOREIGN[name]
    put(folder, path, value)
    for read in (check_folder, Checkpoint):
        with pytest.raises(ValueError, match=r"config\.json: `.*" + path[-1]):
            read(folder)


def test_conversion_reads_no_such_folder(tmp_path):
    config = LlamaConfig(
        vocab_size=19, hidden_size=12, intermediate_size=14, num_hidden_layers=1, num_attention_heads=3
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    variform.from_hf(tmp_path)
    put(tmp_path, ["auto_map", "AutoModelForCausalLM"], "someone/else--modeling.Model")
    with pytest.raises(ValueError, match=r"names code elsewhere, 'someone/else--modeling.Model'"):
        variform.from_hf(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "modeling_variform.Model", "AutoTokenizer": ["tokenization.Slow", None]}},
        {"_attn_implementation": "sdpa", "encoder": {"attn_implementation": "flex_attention"}, "name_or_path": "a/b"},
        {"id2label": {"0": "and/or"}, "task_specific_params": [{"prefix": "a/b"}]},
    ],
)
def test_what_a_config_may_say_is_left_alone(config):
    refuse_foreign_code(config, "config.json")


@pytest.mark.parametrize(("text", "words"), [("[1]", "holds list"), ("{", "is not JSON"), ("", "is not JSON")])
def test_a_config_that_is_none_is_named(text, words, folder):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {words}"):
        check_folder(folder)


@pytest.mark.parametrize("outside", ["../secret.safetensors", "absolute", "link"])
def test_weights_outside_the_folder_are_refused(outside, folder):
    secret = folder.parent / "secret.safetensors"
    (folder / "model.safetensors").rename(secret)
    name = {"absolute": str(secret), "link": "linked.safetensors"}.get(outside, outside)
    (folder / "linked.safetensors").symlink_to(secret)
    with safe_open(secret, framework="pt") as file:
        names = dict.fromkeys(file.keys(), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for read in (check_folder, Checkpoint):
        with pytest.raises(ValueError, match="leads out of"):
            read(folder)


def test_a_whole_folder_passes(folder):
    check_folder(folder)
    assert all(torch.isfinite(Checkpoint(folder)[name]).all() for name in Checkpoint(folder).specs)


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:39], COMMIT + "0", COMMIT.upper() + "g", ""])
def test_code_of_a_repo_needs_a_commit(revision):
    with pytest.raises(ValueError, match=r"code in me/model.*40 hexadecimal digits"):
        check_remote_code("me/model", revision, trust=True)
    check_remote_code("me/model", revision, trust=False)


def test_code_of_a_commit_or_of_a_folder_may_run(tmp_path):
    check_remote_code("me/model", COMMIT, trust=True)
    check_remote_code(tmp_path, None, trust=True)
