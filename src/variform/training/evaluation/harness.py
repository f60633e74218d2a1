"""lm-evaluation-harness (the package `lm_eval`) on a model that is loaded already: of any form, converted, or with adapters."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .metrics import import_evaluate


def judge_by_harness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """What the harness measures.

    Args:
        model: a decoder or an encoder-decoder in evaluation mode.
        tasks: names of its tasks, or of those in `include_path`, a folder of YAML files.
        shots: examples in a prompt; default: the task's own. limit: judge by the first so many of a task.

    Returns:
        `{task: {metric: value}}`, numbers only.

    Raises:
        ImportError: where the harness is not installed. ValueError: for a task it does not know.
    """
    import_evaluate()  # the harness imports it as well
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ImportError(f"`lm_eval` needs {error.name}: pip install 'lm_eval[hf]'") from error
    backend = "seq2seq" if model.config.is_encoder_decoder else "causal"
    judged = HFLM(pretrained=model, tokenizer=tokenizer, backend=backend, batch_size=batch_size)
    manager = TaskManager(include_path=include_path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        where = (
            f", nor is it in {include_path}" if include_path else "; `include_path` names a folder of further tasks"
        )
        raise ValueError(f"`lm_eval` knows no task {unknown[0]!r}{where}.")
    found = lm_eval.simple_evaluate(
        model=judged, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
    )
    return {
        task: {name: value for name, value in measured.items() if isinstance(value, (int, float))}
        for task, measured in found["results"].items()
    }
