"""One of two processes that shard a model: `torchrun --nproc_per_node 2 parallel_steps.py FOLDER WAYS...`."""

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import variform  # noqa: F401  # registers the family
from variform.training.parallel import Recipe, train_in_parallel


def main(folder: Path, ways: list[str]) -> None:
    results = {}
    data = torch.load(folder / "data.pt")
    for way in ways:
        parallel, form = way.split("/")
        head = AutoModelForSeq2SeqLM if form == "pair" else AutoModelForCausalLM
        recipe = Recipe(parallel, steps=4, batch_size=4, save_steps=2, max_grad_norm=0.5)
        out = folder / way.replace("/", "-")
        whole = train_in_parallel(folder / form, data, out, recipe, auto_class=head)
        # As if the run had been killed after its second step
        if dist.get_rank() == 0:
            shutil.rmtree(out / "checkpoint-4")
        dist.barrier()
        resumed = train_in_parallel(folder / form, data, out, recipe, auto_class=head)
        results[way] = {"losses": whole.losses, "hash": whole.state_hash}
        results[way] |= {"resumed": resumed.losses, "resumed hash": resumed.state_hash}
        local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in whole.model.parameters())
        results[way]["local"] = local
    try:
        train_in_parallel(folder / form, data, out, recipe._replace(batch_size=2), auto_class=head)
    except ValueError as error:
        results["refused"] = str(error)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
