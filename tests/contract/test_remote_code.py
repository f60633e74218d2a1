"""A saved checkpoint loads through every Auto class in a process that has never heard of Variform.

The models are saved here; one other process, in which `import variform` fails, loads each with `trust_remote_code=True`,
saves it again and loads that; what it computed is compared here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import build, inputs, tiny
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import variform
from variform.model.configuration_variform import AUTO_MAP

# Forms whose tensors are not all in the checkpoint: slopes, rotary tables, ties
FORMS = {
    "variform_encoder": tiny("encoder", position_embedding_type="alibi", pooler=True, type_vocab_size=2, num_labels=4),
    "variform_decoder": tiny(
        "decoder",
        qk_norm="head",
        num_key_value_heads=1,
        attention_patterns=["full", "sliding_window:3"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "variform_encoder_decoder": tiny(
        "encoder_decoder",
        encoder={"position_embedding_type": "relative_bias", "norm_type": "layer_norm"},
        decoder={"position_embedding_type": "sinusoidal", "attention_sinks": True, "attention_bias": ["q"]},
    ),
}
CASES = {
    f"{model_type}-{auto_name}": (model_type, auto_name)
    for model_type, entries in AUTO_MAP.items()
    for auto_name in entries
    if auto_name != "AutoConfig"
}

# Takes a folder with jobs.json, {name: [folder of a checkpoint, Auto class]}, and inputs.pt; leaves {name: outputs}
STRANGER = """
import json, sys
from pathlib import Path
sys.modules["variform"] = None  # `import variform` raises, even where it is installed
import torch, transformers
folder = Path(sys.argv[1])
given = torch.load(folder / "inputs.pt")

def outputs(path, auto_name, inputs):
    model = getattr(transformers, auto_name).from_pretrained(path, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    with torch.no_grad():
        return model, model(**inputs)[0]

results = {}
for name, (path, auto_name) in json.loads((folder / "jobs.json").read_text()).items():
    model, first = outputs(path, auto_name, given[name])
    model.save_pretrained(folder / "again" / name)
    results[name] = (first, outputs(folder / "again" / name, auto_name, given[name])[1])
torch.save(results, folder / "results.pt")
"""


class Repeated(Dataset):
    """Four times the same row."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        row = inputs(batch=1)[0]
        return {"input_ids": row, "labels": row}


def example(model_type: str, auto_name: str) -> dict[str, torch.Tensor]:
    """Inputs for a class, with padding on the right."""
    input_ids = inputs(batch=4)
    mask = torch.ones_like(input_ids)
    mask[1, 5:] = 0
    if auto_name == "AutoModelForMultipleChoice":
        return {"input_ids": input_ids.view(2, 2, -1), "attention_mask": mask.view(2, 2, -1)}
    example = {"input_ids": input_ids, "attention_mask": mask}
    if model_type == "variform_encoder_decoder":
        example["decoder_input_ids"] = inputs(batch=4, length=5, seed=1)
    return example


def run_stranger(folder: Path) -> None:
    """Runs `STRANGER` with no path of ours, and with its own cache for the code that it downloads."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment.update(HF_HOME=str(folder / "home"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-c", STRANGER, str(folder)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Saves a model of every class and one of Trainer's checkpoints, and has the stranger load them all."""
    folder = tmp_path_factory.mktemp("remote")
    jobs, given, expected = {}, {}, {}
    for name, (model_type, auto_name) in CASES.items():
        model = build(FORMS[model_type], getattr(transformers, auto_name))
        model.save_pretrained(folder / name)
        jobs[name], given[name] = (str(folder / name), auto_name), example(model_type, auto_name)
        with torch.no_grad():
            expected[name] = model(**given[name])[0]

    model = build(FORMS["variform_decoder"], transformers.AutoModelForCausalLM)
    arguments = TrainingArguments(
        folder / "run", max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=Repeated()).train()
    jobs["trainer"] = (str(folder / "run" / "checkpoint-1"), "AutoModelForCausalLM")
    given["trainer"] = example("variform_decoder", "AutoModelForCausalLM")
    with torch.no_grad():
        expected["trainer"] = model.eval()(**given["trainer"])[0]

    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    torch.save(given, folder / "inputs.pt")
    run_stranger(folder)
    return folder, given, expected, torch.load(folder / "results.pt")


@pytest.mark.parametrize("name", [*CASES, "trainer"])
def test_a_stranger_computes_the_same(world, name):
    _, _, expected, results = world
    torch.testing.assert_close(results[name][0], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*CASES, "trainer"])
def test_a_stranger_saves_and_loads_it_again(world, name):
    _, _, expected, results = world
    torch.testing.assert_close(results[name][1], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_where_variform_is_imported_its_own_class_loads_what_a_stranger_saved(world, name):
    folder, given, expected, _ = world
    auto_name = CASES[name][1]
    model = getattr(transformers, auto_name).from_pretrained(folder / "again" / name).eval()
    assert type(model).__module__ == "variform.model.modeling_variform"
    with torch.no_grad():
        torch.testing.assert_close(model(**given[name])[0], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", ["", "again"])
@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_names_every_auto_class_and_carries_its_code(world, name, where):
    folder = world[0] / where / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == AUTO_MAP[CASES[name][0]]
    payload = {path.name for path in (Path(variform.__file__).parent / "model").glob("*.py")} - {"__init__.py"}
    assert payload <= {path.name for path in folder.glob("*.py")}


def test_a_checkpoint_of_one_head_loads_through_the_auto_class_of_another(world):
    """The body of the masked language model, read as a base model by a stranger's Auto class."""
    folder, given, _, _ = world
    name = "variform_encoder-AutoModelForMaskedLM"
    masked = transformers.AutoModelForMaskedLM.from_pretrained(folder / name).eval()
    body = transformers.AutoModel.from_pretrained(folder / name).eval()
    with torch.no_grad():
        states = masked.model(**given[name]).last_hidden_state
        torch.testing.assert_close(body(**given[name]).last_hidden_state, states)
