"""One of some processes that train through Trainer: `torchrun --nproc_per_node 2 parallel_ddp.py FOLDER FORM BATCH`."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

import variform  # noqa: F401  # registers the family
from variform.training.run import leave_group


def main(folder: Path, form: str, batch_size: int) -> None:
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        folder / f"{form}-{asked}",
        per_device_train_batch_size=batch_size,
        max_steps=4,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    assert arguments.world_size == asked
    model = AutoModelForCausalLM.from_pretrained(folder / form)
    trainer = Trainer(
        model, arguments, train_dataset=torch.load(folder / "data.pt"), data_collator=default_data_collator
    )
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        torch.save({"losses": losses, "weights": weights}, folder / f"{form}-{asked}.pt")
        (folder / f"{form}-{asked}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    leave_group()  # once nothing is left that uses it
