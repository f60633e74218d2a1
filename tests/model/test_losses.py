"""The chunked loss is the plain loss: values, gradients, under wrappers, autocast, compilation and sharding."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from variform.model import losses
from variform.model.losses import HEAD_CALLS, cross_entropy, linear_cross_entropy, shift_labels

WIDTH, VOCAB = 6, 23


def plain_loss(logits, labels, *, num_items_in_batch=None, label_smoothing=0.0, z_loss_coef=0.0):
    """The definition, over the rows that count."""
    logits, labels = logits.double()[labels != -100], labels[labels != -100]
    log_probs = logits.log_softmax(-1)
    loss = -(1 - label_smoothing) * log_probs.gather(-1, labels[:, None]).squeeze(-1)
    loss = loss - label_smoothing * log_probs.mean(-1) + z_loss_coef * logits.logsumexp(-1) ** 2
    return loss.sum() / (num_items_in_batch or max(1, len(labels)))


def plain_linear_loss(hidden, head, labels, *, logit_scale=1.0, logit_softcap=None, **options):
    logits = head(hidden) * logit_scale
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return plain_loss(logits, labels, **options)


def make(batch=2, seq=7, ignored=0.3, bias=True, dtype=torch.float32, scale=2.0):
    """Hidden states, head and labels; the logits are far apart, so that softmax is not flat."""
    head = nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype)
    hidden = (scale * torch.randn(batch, seq, WIDTH)).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (batch, seq)).masked_fill(torch.rand(batch, seq) < ignored, -100)
    return hidden, head, labels


def results(loss_function, hidden, head, labels, **options):
    """Loss and the gradients of hidden states and all parameters (None where frozen)."""
    head.zero_grad()
    hidden.grad = None
    loss = loss_function(hidden, head, labels, **options)
    loss.backward()
    return [loss.detach().float(), hidden.grad, *(parameter.grad for parameter in head.parameters())]


def assert_same(ours, theirs, rtol=1e-5, atol=1e-6):
    """Tensors equal up to rounding and type; None where the other is None."""
    ours, theirs = ([None if tensor is None else tensor.float() for tensor in tensors] for tensors in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


OPTIONS = st.fixed_dictionaries(
    {
        "logit_scale": st.sampled_from([1.0, 0.3]),
        "logit_softcap": st.sampled_from([None, 2.5]),
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "z_loss_coef": st.sampled_from([0.0, 0.01]),
        "num_items_in_batch": st.sampled_from([None, 5, 31]),
    }
)


@given(OPTIONS, st.booleans(), st.sampled_from([0.0, 0.4, 0.95]), st.sampled_from([None, 1, 3, 100]), st.booleans())
def test_chunked_loss_and_gradients_equal_the_plain_ones(options, bias, ignored, chunk_size, is_wrapped):
    hidden, head, labels = make(bias=bias, ignored=ignored)
    expected = results(plain_linear_loss, hidden, head, labels, **options)
    if is_wrapped:
        head.register_forward_hook(lambda *_: None)
    assert_same(results(linear_cross_entropy, hidden, head, labels, chunk_size=chunk_size, **options), expected)


@given(OPTIONS)
def test_loss_of_given_logits_equals_the_plain_one(options):
    options = {name: value for name, value in options.items() if not name.startswith("logit")}
    logits, labels = 3 * torch.randn(2, 5, VOCAB), make(seq=5)[2]
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, expected = cross_entropy(ours, labels, **options), plain_loss(theirs, labels, **options)
    loss.backward()
    expected.backward()
    assert_same([loss, ours.grad], [expected, theirs.grad])


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_double_precision_stays_double(is_wrapped):
    hidden, head, labels = make(dtype=torch.float64)
    options = {"label_smoothing": 0.1, "z_loss_coef": 0.01, "logit_softcap": 3.0}
    expected = plain_linear_loss(hidden, head, labels, **options)
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    if is_wrapped:
        head.register_forward_hook(lambda *_: None)
    loss = linear_cross_entropy(hidden, head, labels, chunk_size=4, **options)
    loss.backward()
    torch.testing.assert_close([loss, hidden.grad], [expected, expected_grad], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_bfloat16_inputs_lose_no_more_than_their_own_rounding(chunk_size):
    hidden, head, labels = make(dtype=torch.bfloat16)
    exact_head, exact_hidden = copy.deepcopy(head).float(), hidden.detach().float().requires_grad_()
    ours = results(linear_cross_entropy, hidden, head, labels, chunk_size=chunk_size, z_loss_coef=0.01)
    assert [grad.dtype for grad in ours[1:]] == [torch.bfloat16] * 3
    expected = results(plain_linear_loss, exact_hidden, exact_head, labels, z_loss_coef=0.01)
    assert_same(ours, expected, rtol=2e-2, atol=3e-3)


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_parameters():
    hidden, head, labels = make()
    expected = results(plain_linear_loss, hidden, head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(linear_cross_entropy, hidden, head, labels, chunk_size=3)
    assert {grad.dtype for grad in ours[1:]} == {torch.float32}
    assert_same(ours, expected, rtol=2e-2, atol=3e-3)
    assert not torch.allclose(ours[2], expected[2], rtol=1e-6), "nothing was cast"


def test_scaled_float16_gradients_do_not_underflow():
    """A gradient scaler multiplies the loss: dividing by the number of tokens before that would round to zero."""
    hidden, head, labels = make(dtype=torch.float16)
    items, scaler = 10**7, 2.0**20
    ours = results(
        lambda *given: scaler * linear_cross_entropy(*given, num_items_in_batch=items), hidden, head, labels
    )
    exact_head, exact_hidden = copy.deepcopy(head).float(), hidden.detach().float().requires_grad_()
    expected = results(
        lambda *given: scaler * plain_linear_loss(*given, num_items_in_batch=items), exact_hidden, exact_head, labels
    )
    assert_same(ours, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient_and_the_others_the_same(frozen):
    hidden, head, labels = make()
    {"hidden": hidden, "weight": head.weight, "bias": head.bias}[frozen].requires_grad_(False)
    expected = results(plain_linear_loss, hidden, head, labels)
    assert_same(results(linear_cross_entropy, hidden, head, labels, chunk_size=4), expected)


def test_tied_weight_gets_the_gradients_of_both_its_uses():
    embedding, (_, head, labels) = nn.Embedding(VOCAB, WIDTH), make(bias=False)
    head.weight = embedding.weight
    ids = torch.randint(VOCAB, labels.shape)
    gradients = []
    for loss in linear_cross_entropy, plain_linear_loss:
        embedding.zero_grad()
        loss(embedding(ids), head, labels).backward()
        gradients.append(embedding.weight.grad.clone())
    assert_same(gradients[:1], gradients[1:])


def test_without_gradients_only_the_loss_is_computed():
    hidden, head, labels = make()
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, head, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain_linear_loss(hidden, head, labels).float())


@pytest.mark.parametrize("kind", ["bare", "wrapped", "logits"])
def test_batch_without_labels_costs_nothing_and_has_zero_gradients(kind):
    hidden, head, _ = make()
    labels = torch.full(hidden.shape[:-1], -100)
    if kind == "wrapped":
        head.register_forward_hook(lambda *_: None)
    loss_function = linear_cross_entropy
    if kind == "logits":
        loss_function = lambda hidden, head, labels, **options: cross_entropy(head(hidden), labels, **options)  # noqa: E731
    for num_items in None, 0, 7:
        options = {"num_items_in_batch": num_items, "label_smoothing": 0.1, "z_loss_coef": 0.1}
        for result in results(loss_function, hidden, head, labels, **options):
            assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("as_tensor", [int, torch.tensor, lambda count: torch.tensor([count])])
def test_four_accumulated_steps_equal_one_large_batch(as_tensor):
    hidden, head, labels = make(batch=4)
    labels[1, 2:] = -100  # steps of different weight
    count = as_tensor(int((labels != -100).sum()))
    large = results(linear_cross_entropy, hidden, head, labels, num_items_in_batch=count)
    assert_same(large, results(plain_linear_loss, hidden, head, labels))
    head.zero_grad()
    hidden.grad = None
    total = 0
    for row in range(4):
        loss = linear_cross_entropy(hidden[row : row + 1], head, labels[row : row + 1], num_items_in_batch=count)
        loss.backward()
        total += loss.detach()
    assert_same([total, hidden.grad, head.weight.grad, head.bias.grad], large)


def test_gradient_is_multiplied_by_what_comes_from_above():
    hidden, head, labels = make()
    expected = results(lambda *given: 3 * plain_linear_loss(*given) ** 2, hidden, head, labels)
    assert_same(results(lambda *given: 3 * linear_cross_entropy(*given) ** 2, hidden, head, labels), expected)


def test_backward_twice_is_refused():
    hidden, head, labels = make()
    loss = linear_cross_entropy(hidden, head, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for one backward"):
        loss.backward()


def test_second_derivative_is_refused():
    """It would lack the part that goes through the head, in silence."""
    hidden, head, labels = make()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, head, labels), hidden, create_graph=True)


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation had."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))])
        return result


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_full_logits_are_never_built(is_wrapped):
    hidden, head, labels = make(batch=16, seq=16, ignored=0)
    if is_wrapped:
        head.register_forward_hook(lambda *_: None)
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, head, labels, chunk_size=16, label_smoothing=0.1, z_loss_coef=0.1).backward()
    assert largest.size < labels.numel() * VOCAB / 3


def test_ignored_positions_are_not_computed():
    hidden, head, labels = make(batch=1, seq=100, ignored=0.85)
    rows = []
    head.register_forward_hook(lambda module, given, logits: rows.append(len(logits)))
    linear_cross_entropy(hidden, head, labels)
    assert sum(rows) == max(HEAD_CALLS, int((labels != -100).sum()))


@pytest.mark.parametrize("seq", [1, 3, 8, 50])
def test_wrapped_head_is_called_equally_often_at_every_length(seq):
    """Each call of a sharded head is a collective."""
    hidden, head, labels = make(seq=seq)
    rows = []
    head.register_forward_hook(lambda module, given, logits: rows.append(len(logits)))
    linear_cross_entropy(hidden, head, labels)
    assert len(rows) == HEAD_CALLS and min(rows) > 0


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB)

    def forward(self, hidden, labels, loss_function):
        return loss_function(self.body(hidden), self.lm_head, labels)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["lm_head", "body"], "r": 2},
        {"target_modules": ["body"], "modules_to_save": ["lm_head"], "r": 2},
        {"target_modules": ["lm_head"], "r": 2, "use_dora": True},
    ],
    ids=["lora", "trained_copy", "dora"],
)
def test_adapted_head_trains_as_with_full_logits(adapter):
    hidden, _, labels = make()
    model = get_peft_model(Reader(), LoraConfig(**adapter))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the gradient of lora_A
            nn.init.normal_(parameter)
    gradients = []
    for loss_function in linear_cross_entropy, plain_linear_loss:
        model.zero_grad()
        model(hidden, labels, loss_function).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert any(grad.abs().max() > 0 for grad in gradients[0])
    assert_same(*gradients)


def test_dropout_inside_an_adapter_is_the_same_in_backward():
    hidden, _, labels = make(dtype=torch.float64)
    model = get_peft_model(Reader(), LoraConfig(target_modules=["lm_head"], r=2, lora_dropout=0.5)).double()
    nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    weight = model.base_model.model.lm_head.lora_A["default"].weight
    step, moved = 1e-4, []
    torch.manual_seed(1)
    model(hidden, labels, linear_cross_entropy).backward()
    direction = weight.grad / weight.grad.norm()
    for sign in 1, -1:
        torch.manual_seed(1)
        with torch.no_grad():
            weight += sign * step * direction
            moved.append(model(hidden, labels, linear_cross_entropy))
            weight -= sign * step * direction
    torch.testing.assert_close((moved[0] - moved[1]) / (2 * step), weight.grad.norm(), rtol=1e-6, atol=0)


def test_hooks_of_the_head_run():
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return 2 * output

    hidden, head, labels = make()
    expected = results(plain_linear_loss, hidden, head, labels, logit_scale=2.0)
    assert_same(results(linear_cross_entropy, hidden, add_hook_to_module(head, Doubling()), labels), expected)


@pytest.mark.parametrize("head_class", [nn.Linear, type("OwnLinear", (nn.Linear,), {})])
def test_compiles_in_whole_and_once_for_all_lengths(head_class, monkeypatch):
    monkeypatch.setattr(losses, "HEAD_CALLS", 2)  # traces in a quarter of the time
    torch._dynamo.reset()
    _, head, _ = make()
    head.__class__ = head_class
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    options = {"label_smoothing": 0.1, "z_loss_coef": 0.01}
    for seq in 11, 8, 9, 30:
        hidden, _, labels = make(seq=seq)
        expected = results(plain_linear_loss, hidden, head, labels, **options)
        assert_same(results(compiled, hidden, head, labels, **options), expected)
    assert len(graphs) == 2  # the first length alone, then any length


def test_label_out_of_range_is_named():
    hidden, head, labels = make()
    labels[1, 4] = VOCAB
    message = f"`labels[1, 4] = {VOCAB}` is outside the {VOCAB} classes of the head (0 to {VOCAB - 1}); give -100"
    for loss in lambda: linear_cross_entropy(hidden, head, labels), lambda: cross_entropy(head(hidden), labels):
        with pytest.raises(ValueError, match=re.escape(message)):
            loss()


@pytest.mark.parametrize("label", [-1, -101, 2**40])
def test_no_other_number_than_the_ignored_one_is_let_through(label):
    hidden, head, labels = make(ignored=0)
    labels[0, 3] = label
    with pytest.raises(ValueError, match=re.escape(f"`labels[0, 3] = {label}`")):
        linear_cross_entropy(hidden, head, labels)


def test_another_ignored_index_is_honoured():
    hidden, head, labels = make()
    expected = results(linear_cross_entropy, hidden, head, labels)
    own = labels.masked_fill(labels == -100, -7)
    assert_same(results(linear_cross_entropy, hidden, head, own, ignore_index=-7), expected)


def test_labels_of_wrong_type_or_shape_are_refused():
    hidden, head, labels = make()
    with pytest.raises(ValueError, match=r"`labels` must hold integer ids, got dtype torch.float32"):
        linear_cross_entropy(hidden, head, labels.float())
    with pytest.raises(ValueError, match=r"`labels` has shape \(2, 6\), expected \(2, 7\)"):
        linear_cross_entropy(hidden, head, labels[:, 1:])


def test_short_integer_labels_are_accepted():
    hidden, head, labels = make()
    assert_same(
        results(linear_cross_entropy, hidden, head, labels.int()), results(linear_cross_entropy, hidden, head, labels)
    )


def test_shifted_labels_are_the_next_tokens():
    assert shift_labels(torch.tensor([[1, 2, 3], [4, -100, 6]])).tolist() == [[2, 3, -100], [-100, 6, -100]]


def sharded_steps(rank, folder, batches):
    """One of two processes: losses and gradients of its batch, with the head a unit of its own."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh, found = init_device_mesh("cpu", (2,)), []
    hidden, labels, count = batches[rank]
    for reshard in True, False:
        torch.manual_seed(0)
        model = Reader()
        fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh)
        for _ in range(2):  # the second step shows what the first left behind
            model.zero_grad()
            loss = model(hidden, labels, lambda *given: linear_cross_entropy(*given, num_items_in_batch=count))
            loss.backward()
        gradients = [2 * parameter.grad.full_tensor() for parameter in model.parameters()]  # FSDP takes the mean
        found.append((loss.detach(), gradients))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_sharded_head_equals_one_process(tmp_path):
    """FSDP2 with batches of different lengths, so that an unequal number of collectives would hang."""
    (long, _, long_labels), (short, _, short_labels) = make(seq=30), make(seq=3)
    count = int((long_labels != -100).sum() + (short_labels != -100).sum())
    batches = [(long.detach(), long_labels, count), (short.detach(), short_labels, count)]
    torch.multiprocessing.spawn(sharded_steps, (str(tmp_path), batches), nprocs=2)

    torch.manual_seed(0)
    model = Reader()
    expected = sum(
        model(h, y, lambda *given: plain_linear_loss(*given, num_items_in_batch=count)) for h, y, _ in batches
    )
    expected.backward()
    for (loss, gradients), (other_loss, _) in zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(2))):
        assert_same([loss + other_loss, *gradients], [expected, *(parameter.grad for parameter in model.parameters())])
