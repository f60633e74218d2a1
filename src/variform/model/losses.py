"""Cross-entropy of language-model heads, and what keeps routers even: pure functions.

Legend: N tokens, V vocabulary, D width of the head's input, C tokens in a chunk.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# Logits held at a time: 24 MiB of float32 stay in a CPU's cache, but are too little work for an accelerator.
CPU_CHUNK_LOGITS, ACCELERATOR_CHUNK_LOGITS = 3 * 2**21, 2**27
# In half precision a chunk is held twice more, beside sums of its products in float32: a CPU takes a sixth at a time.
CPU_CHUNK_LOGITS_HALF = 2**20
# With fewer tokens, products spend their time on reading the weight.
MIN_CHUNK_TOKENS = 96
# How often a wrapped head is called. Constant, because under FSDP a call is a collective: processes whose batches have
# different lengths would otherwise wait for each other for ever.
HEAD_CALLS = 8


def shift_labels(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Next-token targets `(batch, seq)`: labels moved one to the left; the last position predicts nothing."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def scale_logits(logits: torch.Tensor, logit_scale: float = 1.0, logit_softcap: float | None = None) -> torch.Tensor:
    """Logits times a constant, then soft-capped: `cap * tanh(logits / cap)` (Gemma 2, arXiv:2408.00118, sec. 2)."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if logit_softcap is None else torch.tanh(logits / logit_softcap) * logit_softcap


def check_labels(
    labels: torch.Tensor, shape: tuple[int, ...], num_classes: int | None, ignore_index: int = -100
) -> None:
    """Refuses labels that are not class ids, one a position.

    The range is read on the CPU only: elsewhere it would make the host wait, and the kernel itself checks it. So it
    does where `num_classes` is None, as some wrappers of a head do not tell their width.

    Raises:
        ValueError: naming the dtype, both shapes, or the first label out of range.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"`labels` must hold integer ids, got dtype {labels.dtype}; use `labels.long()`.")
    if tuple(labels.shape) != tuple(shape):
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}, expected {tuple(shape)}: one label a position.")
    if num_classes is None or is_traced() or labels.device.type != "cpu":
        return
    is_wrong = (labels != ignore_index) & ((labels < 0) | (labels >= num_classes))
    if is_wrong.any():
        first = is_wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`labels[{', '.join(map(str, first))}] = {labels[tuple(first)]}` is outside the {num_classes} classes of "
            f"the head (0 to {num_classes - 1}); give {ignore_index} to positions that carry no weight."
        )


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Mean cross-entropy of the labels that count, in float32; 0 with zero gradients where none does.

    A label costs `(1 - s) * -log p[label] + s * mean(-log p) + z_loss_coef * logsumexp(logits)**2`: label smoothing
    `s` as in torch (arXiv:1512.00567, sec. 7) and z-loss (PaLM, arXiv:2204.02311, sec. 5).

    Args:
        logits: `(..., num_classes)`.
        labels: `(...)` integers in `[0, num_classes)`; `ignore_index` carries no weight.
        num_items_in_batch: divides the sum in place of the number of labels that count, so that the losses of
            accumulated steps add up to the one of a large batch.

    Raises:
        ValueError: if the labels are not integers, have another shape or are out of range.
    """
    check_labels(labels, logits.shape[:-1], logits.shape[-1], ignore_index)
    labels = labels.to(logits.device, torch.long)
    total = _loss_sum(logits.flatten(0, -2), labels.flatten(), label_smoothing, z_loss_coef, ignore_index)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum()
    return _divide(total, num_items_in_batch)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> torch.Tensor:
    """`cross_entropy` of `scale_logits(lm_head(hidden_states))`, holding the logits of a few tokens at a time.

    Tokens without weight are left out. A bare `nn.Linear` goes the fast way (`LinearCrossEntropy`). Any other head
    (LoRA, quantized, FSDP, with hooks) is called chunk by chunk, and again in backward: reading its weight would leave
    out what the wrapper adds.

    Args:
        hidden_states: `(..., D)`. lm_head: maps them to `(..., V)`.
        labels: `(...)`, the token that each position should predict; see `cross_entropy`, also for the other options.
        chunk_size: tokens in a chunk of the fast way. Default: as many as keep it fast at a bounded memory.

    Raises:
        ValueError: if the labels are not integers, have another shape or are out of range.
    """
    check_labels(labels, hidden_states.shape[:-1], getattr(lm_head, "out_features", None), ignore_index)
    labels = labels.to(hidden_states.device, torch.long).flatten()
    hidden_states = hidden_states.flatten(0, -2)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum()
    if not is_traced():
        counted = (labels != ignore_index).nonzero().squeeze(1)
        hidden_states, labels = hidden_states.index_select(0, counted), labels[counted]
    options = (logit_scale, logit_softcap, label_smoothing, z_loss_coef, ignore_index)
    if _is_plain_linear(lm_head):
        num_chunks = _num_chunks(len(labels), chunk_size, lm_head)
        setting = (num_chunks, torch.is_grad_enabled(), *options)
        total = LinearCrossEntropy.apply(hidden_states, lm_head.weight, lm_head.bias, labels, *setting)
    else:
        total = _sum_over_head_calls(hidden_states, lm_head, labels, *options)
    return _divide(total, num_items_in_batch)


def balance_loss(scores: torch.Tensor, experts: torch.Tensor, is_real: torch.Tensor | None = None) -> torch.Tensor:
    """How unevenly each sequence's tokens are routed, `(batch,)`: k for an even load, at most E.

    `E * sum(f * P)` with f an expert's share of the choices (k of each token) and P its mean score (Switch,
    arXiv:2101.03961, sec. 2.2), scaled as in transformers. Taken per sequence (DeepSeek-V3, arXiv:2412.19437, eq. 17-20), so
    that a batch in pieces has the loss of the whole.

    Args:
        scores: `(batch, seq, E)`, each token's add up to 1. experts: `(batch, seq, k)`, the chosen ones.
        is_real: `(batch, seq)`, False for padding; default: all are.
    """
    real = scores.new_ones(scores.shape[:2]) if is_real is None else is_real.to(scores.dtype)
    length = real.sum(1, keepdim=True).clamp(min=1)
    share = torch.zeros_like(scores[:, 0]).scatter_add(
        1, experts.flatten(1), real.repeat_interleave(experts.shape[-1], 1)
    )
    mean = (scores * real[..., None]).sum(1) / length
    return scores.shape[-1] * (share / length * mean).sum(-1)


def router_z_loss(logits: torch.Tensor, is_real: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of `logsumexp(logits)**2` over each sequence's tokens, `(batch, seq, E)` -> `(batch,)` (ST-MoE, arXiv:2202.08906,
    eq. 5)."""
    squares = logits.logsumexp(-1).square()
    if is_real is None:
        return squares.mean(1)
    return (squares * is_real).sum(1) / is_real.sum(1).clamp(min=1)


def add_router_losses(
    loss: torch.Tensor,
    router_losses: torch.Tensor,
    labels: torch.Tensor,
    coefficients: tuple[float, float],
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """A training loss with what routing costs: each sequence weighs as its labels do, so that accumulated steps add up.

    Args:
        router_losses: `(batch, 2)`: balance and z of each sequence. labels: `(batch, ...)`; -100 carries no weight.
        coefficients: of the two. num_items_in_batch: labels of all accumulated steps; default: of these.
    """
    counted = (labels != -100).flatten(1).sum(1) if labels.ndim > 1 else (labels != -100).long()
    total = counted.sum() if num_items_in_batch is None else num_items_in_batch
    balance, z_loss = (router_losses * counted[:, None].to(router_losses.device)).sum(0)
    return loss + _divide(coefficients[0] * balance + coefficients[1] * z_loss, total)


def is_traced() -> bool:
    """Whether values cannot be looked at, because a graph is being recorded."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module does nothing but `F.linear` with the weight that it holds."""
    return (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, torch.Tensor)
        and "forward" not in vars(module)  # accelerate's hooks replace the method on the instance
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def _num_chunks(num_tokens: int, chunk_size: int | None, lm_head: Any) -> int:
    if chunk_size is None and is_traced():
        return HEAD_CALLS  # a number that followed the length would be compiled anew for each length
    logits = ACCELERATOR_CHUNK_LOGITS
    if lm_head.weight.device.type == "cpu":
        logits = CPU_CHUNK_LOGITS if lm_head.weight.dtype == torch.float32 else CPU_CHUNK_LOGITS_HALF
    default = max(MIN_CHUNK_TOKENS, logits // lm_head.out_features)
    return max(1, math.ceil(num_tokens / (chunk_size or default)))


def _divide(total: torch.Tensor, num_items: torch.Tensor | int) -> torch.Tensor:
    if isinstance(num_items, torch.Tensor):
        # DataParallel hands each replica a count of shape (1,)
        return total / num_items.to(total.device).squeeze().clamp(min=1)
    return total / max(1, num_items)


def _loss_sum(logits, labels, label_smoothing, z_loss_coef, ignore_index):
    """Sum of the losses of `(C, V)` logits and `(C,)` labels; the plain twin of `_loss_and_gradient_`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": "sum"}
    total = F.cross_entropy(logits, labels, **options)
    if z_loss_coef:
        total = total + z_loss_coef * (logits.logsumexp(-1).square() * (labels != ignore_index)).sum()
    return total


def _sum_over_head_calls(hidden_states, lm_head, labels, logit_scale, logit_softcap, *loss_options):
    """Sum of the losses, from `HEAD_CALLS` calls of the head whose logits are made again in backward."""
    missing = max(0, HEAD_CALLS - len(labels))  # some heads refuse an empty chunk
    hidden_states = F.pad(hidden_states, (0, 0, 0, missing))
    labels = F.pad(labels, (0, missing), value=loss_options[-1])

    def chunk_loss(chunk, chunk_labels):
        return _loss_sum(scale_logits(lm_head(chunk), logit_scale, logit_softcap), chunk_labels, *loss_options)

    chunks = zip(hidden_states.tensor_split(HEAD_CALLS), labels.tensor_split(HEAD_CALLS))
    return torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


def _loss_and_gradient_(logits, labels, logit_scale, logit_softcap, label_smoothing, z_loss_coef, ignore_index):
    """Sum of the losses of raw `(C, V)` logits, which are overwritten with its gradient.

    With z the scaled logits, lse their logsumexp and p their softmax, a row costs `lse + c lse**2 - (1-s) z[label] -
    s mean(z)`; its gradient in z is `(1 + 2 c lse) p - (1-s) onehot(label) - s/V`.
    """
    weights = (labels != ignore_index).to(logits.dtype)[:, None]
    labels = labels.where(labels != ignore_index, 0)[:, None]
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    if logit_softcap is not None:
        slope = 1 - logits.div_(logit_softcap).tanh_().square()
        logits.mul_(logit_softcap)
    expected = (1 - label_smoothing) * logits.gather(1, labels)
    if label_smoothing:
        expected += label_smoothing * logits.mean(1, keepdim=True)

    top = logits.amax(1, keepdim=True)
    norm = logits.sub_(top).exp_().sum(1, keepdim=True)
    lse = top + norm.log()

    logits.mul_(weights * (1 + 2 * z_loss_coef * lse) / norm)
    logits.scatter_(
        1, labels, logits.gather(1, labels) - weights * (1 - label_smoothing)
    )  # adding is not deterministic
    if label_smoothing:
        logits.sub_(weights * (label_smoothing / logits.shape[1]))
    if logit_softcap is not None:
        logits.mul_(slope)
    if logit_scale != 1.0:
        logits.mul_(logit_scale)
    return (weights * (lse + z_loss_coef * lse.square() - expected)).sum()


def _add_product_(total, left, right, *, beta):
    """`beta * total + left @ right` in place; `total` may be of a higher precision than the factors."""
    if total.dtype == left.dtype:
        return total.addmm_(left, right, beta=beta)
    if not beta:
        return total.copy_(left @ right)
    # An eighth at a time: a whole product would stand beside the sum
    for part, rows in zip(total.tensor_split(8), left.tensor_split(8)):
        part.add_(rows @ right)
    return total


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses of `hidden_states @ weight.T + bias`, with its gradients made in forward, chunk by chunk.

    The logits of a chunk become their own gradient in one buffer and are spent at once on the gradients of the inputs:
    nothing of size `(N, V)` exists. Softmax and sums are in float32, products in the inputs' or autocast's dtype.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, labels, num_chunks, is_grad_enabled, *loss_options):
        """`(N, D)`, `(V, D)`, `(V,)` or None, and `(N,)` labels -> scalar."""
        device = hidden_states.device
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_states, weight, bias)]
        ctx.is_spent = False
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        dtype, exact = hidden_states.dtype, torch.promote_types(hidden_states.dtype, torch.float32)

        needs_hidden, needs_weight, needs_bias = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden_states) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if needs_bias else None
        loss = torch.zeros((), dtype=exact, device=device)
        buffer = torch.empty(-(-len(labels) // num_chunks), len(weight), dtype=exact, device=device)
        bounds = [len(labels) * number // num_chunks for number in range(num_chunks + 1)]
        with torch.autocast(device.type, enabled=False):
            for start, end in pairwise(bounds):
                hidden = hidden_states[start:end]
                logits = _add_product_(buffer[: end - start], hidden, weight.t(), beta=0)
                if bias is not None:
                    logits.add_(bias)
                loss += _loss_and_gradient_(logits, labels[start:end], *loss_options)
                grad_logits = logits.to(dtype)
                if needs_hidden:
                    _add_product_(grad_hidden[start:end], grad_logits, weight, beta=0)
                if needs_weight:
                    _add_product_(grad_weight, grad_logits.t(), hidden, beta=1)
                if needs_bias:
                    grad_bias.add_(logits.sum(0))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        """Scales the gradients in place: a copy of the weight's would double the peak."""
        if ctx.is_spent or (torch.is_grad_enabled() and not is_traced()):
            raise RuntimeError(
                "`linear_cross_entropy` keeps its gradients for one backward (`retain_graph`) and has no second "
                "derivative (`create_graph`); take `cross_entropy` of the logits, or `skip_logits=False` in a model."
            )
        ctx.is_spent = True
        grads = [
            None if grad is None else grad.mul_(grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes)
        ]
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))
