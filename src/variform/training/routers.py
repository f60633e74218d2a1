"""Routers while they train: the bias that evens out their load, and statistics of who computes what.

Legend: E experts of a layer, k of them a token.
"""

import json
import math
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..model.moe import BiasedTokensChoose, ExpertsChoose, Router, Routing
from ..model.stacks import TransformerStack

LOAD_FILE = "expert_load.jsonl"

logger = logging.get_logger(__name__)


class RouterLoads:
    """Counts, while a model trains, the real tokens that each router sends to each of its experts.

    Counted is what a stack routes while its own forward runs: gradient checkpointing calls the layers again in backward, and
    those calls are left out. So are evaluation, and calls without gradients (generation in the midst of training).

    Args:
        model: whatever holds routers; under DDP, PEFT or a compiler the bare model and the wrapper are alike.
        kind: count only routers of this class.

    Attributes:
        routers: `{name of the layer: router}`, in order.
        stacks: `{name of the layer: the stack it belongs to}`.
    """

    def __init__(self, model: nn.Module, kind: type[Router] = Router):
        self.routers: dict[str, Router] = {}
        self.stacks: dict[str, Any] = {}
        self._is_counting = False
        self._hooks: list[Any] = []
        stacks: list[tuple[str, Any]] = [
            item for item in model.named_modules() if isinstance(item[1], TransformerStack)
        ]
        for prefix, stack in stacks:
            for name, router in stack.named_modules():
                if not isinstance(router, kind):
                    continue
                layer = f"{prefix}.{name}".strip(".").removesuffix(".gate").removesuffix(".mlp")
                self.routers[layer], self.stacks[layer] = router, stack
                self._hooks.append(router.register_forward_hook(self._count))
            self._hooks.append(stack.register_forward_pre_hook(self._enter))
            self._hooks.append(stack.register_forward_hook(self._leave, always_call=True))
        self._places = {id(router): place for place, router in enumerate(self.routers.values())}
        self._counts: list[torch.Tensor | None] = [None] * len(self.routers)

    def take(self) -> list[torch.Tensor]:
        """Of each router `(E + 2,)` integers, summed over processes: how many tokens each expert computed; how many choices
        found no room (with expert choice: tokens that no expert took); and how many there were. Counting starts anew."""
        counts = [
            torch.zeros(router.num_experts + 2, dtype=torch.long, device=router.weight.device)
            if count is None
            else count
            for router, count in zip(self.routers.values(), self._counts)
        ]
        self._counts = [None] * len(counts)
        if counts and torch.distributed.is_available() and torch.distributed.is_initialized():
            whole = torch.cat([count.to(counts[0].device) for count in counts])
            torch.distributed.all_reduce(whole)
            counts = list(whole.split([len(count) for count in counts]))
        return counts

    def state(self) -> list[list[int] | None]:
        """What this process has counted since the last `take`, for `restore`."""
        return [None if count is None else count.tolist() for count in self._counts]

    def restore(self, state: list[list[int] | None]) -> None:
        """Go on from there."""
        self._counts = [
            None if count is None else torch.tensor(count, device=router.weight.device)
            for router, count in zip(self.routers.values(), state, strict=True)
        ]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, stack: nn.Module, inputs: Any) -> None:
        self._is_counting = stack.training and torch.is_grad_enabled()

    def _leave(self, stack: nn.Module, inputs: Any, output: Any) -> None:
        self._is_counting = False

    @torch.no_grad()
    def _count(self, router: Router, inputs: tuple[torch.Tensor, torch.Tensor | None], routing: Routing) -> None:
        if self._is_counting:
            place = self._places[id(router)]
            found, before = count_choices(router, inputs, routing), self._counts[place]
            self._counts[place] = found if before is None else before + found


def count_choices(router: Router, inputs: tuple, routing: Routing) -> torch.Tensor:
    """`(E + 2,)` as in `RouterLoads.take`, of one call of a router."""
    hidden_states, is_real = inputs[0], inputs[1] if len(inputs) > 1 else None
    load = routing.load().sum(0)
    real = load.new_tensor(hidden_states[..., 0].numel()) if is_real is None else is_real.sum()
    if routing.tokens is not None:
        taken = load.new_zeros(hidden_states.shape[:2])
        ones = torch.ones_like(routing.tokens) if routing.counts is None else routing.counts[..., 0].long()
        total = real
        dropped = real - (taken.scatter_add(1, routing.tokens, ones) > 0).sum()
    else:
        total = real * router.top_k
        dropped = total - load.sum()
    return torch.cat((load, torch.stack((dropped, total))))


class RouterBalancer:
    """Moves the biases of routers with `router_type="sigmoid_bias"` towards an even load, in place of a loss.

    After each optimizer step the bias of an expert rises by `router_bias_update_rate` if it computed fewer tokens than the
    mean, and falls by as much if more: `bias += rate * sign(mean - load)` (arXiv:2408.15664, algorithm 1; DeepSeek-V3,
    arXiv:2412.19437, sec. 2.1.2). The load is that of all micro-batches since the last step and of all processes.

    In a loop of one's own, call `step()` after `optimizer.step()`; under Trainer, `BalanceRouters` does.

    Args:
        model: with or without such routers. Their biases are turned to float32, whatever the model is in: in bfloat16 a step
            of 0.001 is lost beside a bias of 0.5.

    Raises:
        ValueError: for a model under a PEFT adapter, whose files do not hold the biases.
    """

    def __init__(self, model: nn.Module):
        if is_adapted(model):
            raise ValueError(
                "`RouterBalancer` moves biases of the base model, which an adapter does not save: leave it out when only an "
                "adapter is trained, or balance before `get_peft_model`."
            )
        self.loads = RouterLoads(model, BiasedTokensChoose)
        for router in self.routers:
            # The same tensor: DDP remembers it
            router.e_score_correction_bias.data = router.e_score_correction_bias.float()

    @property
    def routers(self) -> list[Any]:
        """The routers whose biases move."""
        return list(self.loads.routers.values())

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by what was counted since the last step; without a count, nothing moves."""
        for router, stack, counts in zip(self.routers, self.loads.stacks.values(), self.loads.take()):
            load, bias = counts[:-2], router.e_score_correction_bias
            direction = torch.sign(load.sum() - load * len(load))  # of the mean less the load, in whole numbers
            bias.add_(direction.to(bias), alpha=stack.config.router_bias_update_rate)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.loads.remove()


class BalanceRouters(TrainerCallback):
    """Under Trainer, moves the biases of `sigmoid_bias` routers after each optimizer step (`RouterBalancer`).

    A model without such routers is left alone; so is one under a PEFT adapter, which would not save the biases.
    """

    def __init__(self):
        self.balancer: RouterBalancer | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.balancer = None if is_adapted(model) else RouterBalancer(model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.balancer:
            self.balancer.step()

    def on_train_end(self, args, state, control, **kwargs):
        if self.balancer:
            self.balancer.remove()


class LoadSummary(NamedTuple):
    """How even the load of one layer is."""

    entropy: float  # 1 for an even load, 0 where one expert does all
    max_load: float  # of the busiest expert, as a multiple of the even share
    dropped: float  # share of choices without room; with expert choice, of tokens that no expert took
    spread: float  # as entropy, but 0 where every token goes to the same k experts


def summarize(counts: list[int], num_chosen: int = 1) -> LoadSummary:
    """Args: counts: as a row of `RouterLoads.take`, with at least one token. num_chosen: k."""
    *load, dropped, total = counts
    shares = [count / max(sum(load), 1) for count in load]
    entropy = -sum(share * math.log(share) for share in shares if share)
    lowest, highest = math.log(num_chosen), math.log(len(load))
    return LoadSummary(
        entropy / highest if highest else 1.0,
        max(shares) * len(load),
        dropped / max(total, 1),
        (entropy - lowest) / (highest - lowest) if highest > lowest else 1.0,
    )


class ExpertStatistics(TrainerCallback):
    """Under Trainer, logs how evenly the experts of each layer are used, and warns when a layer gives most of them up.

    At each logging step, over the real tokens since the last one, means over the layers go into Trainer's logs:
    `expert_entropy` of the load (1 is even), `expert_max_load` (of the busiest expert, even is 1) and `expert_dropped` (the
    share of choices without room). The file `expert_load.jsonl` in the output folder has a line for each such step with the
    counts of every expert of every layer; `variform.report.expert_load.draw_expert_load` draws it.

    Trainer writes its logs before it asks callbacks: add this one by `watch_experts`, which puts it before reporters.

    Args:
        min_spread: a layer collapses where the entropy of its load, on a scale from 0 (every token goes to the same k
            experts) to 1 (even), is below this: at 0.5 it is as if sqrt(k * E) of E experts shared the work.
        max_dropped: or where a larger share is dropped: capacity evens out the load of an expert that all tokens want.
        window: over so many logging steps together.
    """

    def __init__(self, *, min_spread: float = 0.5, max_dropped: float = 0.5, window: int = 5):
        self.min_spread, self.max_dropped, self.window = min_spread, max_dropped, window
        self.loads: RouterLoads | None = None
        self.file: Path | None = None
        self._recent: deque[list[list[int]]] = deque(maxlen=window)
        self._warned: set[str] = set()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.loads = RouterLoads(model)
        self._recent.clear()
        if not self.loads.routers or not state.is_world_process_zero:
            return
        self.file = Path(args.output_dir) / LOAD_FILE
        # What an interrupted run logged after its last checkpoint comes again
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not self.loads or not self.loads.routers or "loss" not in (logs or {}):
            return
        counts = [count.tolist() for count in self.loads.take()]
        layers = dict(zip(self.loads.routers, counts))
        summaries = [summarize(count) for count in counts if count[-1]]
        if not summaries:
            return
        figures = {
            f"expert_{name}": sum(getattr(summary, name) for summary in summaries) / len(summaries)
            for name in ("entropy", "max_load", "dropped")
        }
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)
        if self.file is not None:
            line = {
                "step": state.global_step,
                "load": {layer: count[:-2] for layer, count in layers.items()},
                "dropped": {layer: count[-2] for layer, count in layers.items()},
                "choices": {layer: count[-1] for layer, count in layers.items()},
            }
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self._recent.append(counts)
        if len(self._recent) == self.window and state.is_world_process_zero:
            self._warn(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.loads:
            self.loads.remove()

    def log_state(self) -> dict[str, Any]:
        """What the next lines of the log and the next warning are made of, for `load_log_state`; of this process alone."""
        counts = self.loads.state() if self.loads else []
        return {"counts": counts, "recent": list(self._recent), "warned": sorted(self._warned)}

    def load_log_state(self, state: dict[str, Any]) -> None:
        """Go on from there; after `on_train_begin`."""
        if self.loads:
            self.loads.restore(state["counts"])
        self._recent.extend(state["recent"])
        self._warned.update(state["warned"])

    def _warn(self, step: int) -> None:
        for place, (layer, router) in enumerate(self.loads.routers.items()):
            counts = [sum(numbers) for numbers in zip(*(recent[place] for recent in self._recent))]
            num_chosen = 1 if isinstance(router, ExpertsChoose) else router.top_k
            summary = summarize(counts, num_chosen)
            is_even = summary.spread >= self.min_spread and summary.dropped <= self.max_dropped
            if layer in self._warned or not counts[-1] or is_even:
                continue
            self._warned.add(layer)
            logger.warning(
                f"The router of {layer} has collapsed by step {step}: over the last {self.window} logging steps the "
                f"entropy of its load is {summary.entropy:.2f} of an even one, the busiest of {router.num_experts} experts "
                f"has {summary.max_load:.1f} times its share, and {summary.dropped:.0%} of the choices are dropped. Raise "
                "`router_aux_loss_coef` or, for sigmoid_bias, `router_bias_update_rate`; a lower learning rate and "
                "`router_z_loss_coef` help too."
            )


def watch_experts(trainer: Trainer) -> None:
    """Give a Trainer `BalanceRouters` and `ExpertStatistics`, if its model has routers and it has them not."""
    if not any(isinstance(module, Router) for module in trainer.model.modules()):
        return
    callbacks = trainer.callback_handler.callbacks
    for kind in (ExpertStatistics, BalanceRouters):
        if not any(isinstance(callback, kind) for callback in callbacks):
            callbacks.insert(0, kind())  # before those that report what is logged


def is_adapted(model: Any) -> bool:
    """Whether a model carries a PEFT adapter."""
    return hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)
