"""What the scripts in finetune/ are thin over: data, tokenizers, budgets, callbacks, metrics, arguments."""

from .lora import lora_targets
from .routers import BalanceRouters, ExpertStatistics, RouterBalancer, RouterLoads, watch_experts
from .segments import Segments, SegmentTrainer

__all__ = [
    "BalanceRouters",
    "ExpertStatistics",
    "RouterBalancer",
    "RouterLoads",
    "SegmentTrainer",
    "Segments",
    "lora_targets",
    "watch_experts",
]
