"""Normalisation, and where it stands around a residual branch."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467): `h / rms(h) * weight`, without mean or bias.

    Args:
        size: width of the last dimension.
        eps: added to the mean square.
        unit_offset: multiply by `1 + weight` instead, so that weight decay pulls towards the identity (Gemma).
    """

    def __init__(self, size: int, eps: float, unit_offset: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))
        self.eps = eps
        self.unit_offset = unit_offset

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., size)` -> `(..., size)`; computed in float32, returned in the dtype of `hidden_states`."""
        weight = 1.0 + self.weight.float() if self.unit_offset else self.weight
        exact = hidden_states if hidden_states.dtype == torch.float32 else hidden_states.float()
        if hidden_states.device.type == "cpu":
            # torch's own is one kernel on an accelerator, but more calls than this on a CPU
            normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.eps)
        else:
            normed = F.rms_norm(exact, exact.shape[-1:], eps=self.eps)
        normed = normed if self.unit_offset else normed.to(hidden_states.dtype)
        return (weight * normed).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, unit_offset={self.unit_offset}"


def make_norm(config, size: int | None = None) -> nn.Module:
    """The norm that `config` asks for (`norm_type norm_eps norm_bias norm_unit_offset`), by default `hidden_size` wide."""
    size = size or config.hidden_size
    if config.norm_type == "rms_norm":
        return RMSNorm(size, config.norm_eps, config.norm_unit_offset)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


def make_dropout(probability: float) -> nn.Module | None:
    """Dropout, or None where it does nothing: even a call that does nothing is felt in each decoded token."""
    return nn.Dropout(probability) if probability > 0 else None


class LayerScale(nn.Module):
    """A learned factor on each channel of a residual branch (CaiT, arXiv:2103.17239, sec. 2)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.full((config.hidden_size,), float(config.layer_scale_init)))
        self.init_value = float(config.layer_scale_init)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` -> `(..., hidden_size)`."""
        return hidden_states * self.weight


def saturate(hidden_states: torch.Tensor) -> torch.Tensor:
    """float16 ends at 65504, which wide networks exceed (T5's do): what is beyond stays there, where inf would become NaN."""
    if hidden_states.dtype != torch.float16:
        return hidden_states
    most = torch.finfo(torch.float16).max
    return hidden_states.clamp(-most, most)


def mark_residual_writer(linear: Any) -> None:
    """Marks a projection whose output is added to the residual stream: it starts smaller, see `_init_weights`."""
    linear.writes_residual = True


class Residual(nn.Module):
    """One residual branch: `enter` before the sublayer, `leave` after it. The placement is resolved once, here.

    | `norm_placement` | enter     | leave                   | source                     |
    |------------------|-----------|-------------------------|----------------------------|
    | pre              | `norm(h)` | `h + f`                 | arXiv:2002.04745           |
    | post             | `h`       | `norm(h + f)`           | Vaswani, arXiv:1706.03762  |
    | sandwich         | `norm(h)` | `h + norm(f)`           | CogView, arXiv:2105.13290  |
    | reordered        | `h`       | `h + norm(f)`           | OLMo 2, arXiv:2501.00656   |

    `f` is the sublayer's output, after layer scale and dropout where the config has them.

    Args:
        config: reads `norm_placement layer_scale_init hidden_dropout` and the fields of the norm.
        skip_norm: leave out the norm before the sublayer (ModernBERT's first attention).
    """

    def __init__(self, config, skip_norm: bool = False):
        super().__init__()
        placement = config.norm_placement
        has_input_norm = placement in ("pre", "sandwich") and not skip_norm
        # None where the placement has none, and no stand-in: PEFT finds norms by these names
        self.input_norm = make_norm(config) if has_input_norm else None
        self.branch_norm = make_norm(config) if placement in ("sandwich", "reordered") else None
        self.output_norm = make_norm(config) if placement == "post" else None
        self.layer_scale = LayerScale(config) if config.layer_scale_init is not None else None
        self.dropout = make_dropout(config.hidden_dropout)

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the sublayer reads: `(batch, seq, hidden_size)`."""
        return hidden_states if self.input_norm is None else self.input_norm(hidden_states)

    def leave(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        """The residual stream with the sublayer's output `branch` added: `(batch, seq, hidden_size)`."""
        if self.branch_norm is not None:
            branch = self.branch_norm(saturate(branch))
        if self.layer_scale is not None:
            branch = self.layer_scale(branch)
        if self.dropout is not None:
            branch = self.dropout(branch)
        hidden_states = saturate(hidden_states + branch)
        return hidden_states if self.output_norm is None else self.output_norm(hidden_states)
