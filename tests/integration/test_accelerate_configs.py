"""Each file in configs/accelerate is read by accelerate's own classes, key by key."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils.dataclasses import DistributedType

from variform.model.layers import TransformerLayer

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
GROUPS = ("fsdp_config", "deepspeed_config", "parallelism_config")
FLAGS = {action.dest: action for action in launch_command_parser()._actions}


def test_every_layout_has_its_file():
    names = {"ddp", "fsdp2", "tp", "ep", "deepspeed_zero2", "deepspeed_zero3", "multi_node"}
    assert {path.stem for path in FILES} == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_one_of_accelerates(path):
    values = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# ")  # it says when to use it
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert values.keys() <= {field.name for field in dataclasses.fields(ClusterConfig)}
    assert config.distributed_type in list(DistributedType)
    for group in GROUPS:
        for key, value in values.get(group, {}).items():
            assert key in FLAGS, f"{group}.{key}"
            choices = FLAGS[key].choices
            assert choices is None or str(value) in map(str, choices), f"{group}.{key}={value}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_meshes_have_as_many_processes_as_are_started(path):
    values = yaml.safe_load(path.read_text())
    assert values["num_processes"] % values["num_machines"] == 0
    mesh = values.get("parallelism_config")
    if mesh:
        sizes = {key.removeprefix("parallelism_config_"): value for key, value in mesh.items()}
        assert ParallelismConfig(**sizes).total_size == values["num_processes"]


@pytest.mark.parametrize(
    "path", [path for path in FILES if "fsdp_config" in path.read_text()], ids=lambda path: path.stem
)
def test_the_wrapped_class_is_our_layer(path):
    wrapped = yaml.safe_load(path.read_text())["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    assert wrapped == TransformerLayer.__name__
