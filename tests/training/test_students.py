"""A student has the layers of its teacher that it is told, as they are, and takes nothing from it."""

import copy

import pytest
import torch
from tiny import build, tiny
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from variform.training.students import student_of


@pytest.mark.parametrize("auto_class, shape", [(AutoModelForMaskedLM, "encoder"), (AutoModelForCausalLM, "decoder")])
def test_a_student_begins_as_layers_of_the_teacher(auto_class, shape):
    patterns = ["full", "sliding_window:2"]
    teacher = build(tiny(shape, num_hidden_layers=4, attention_patterns=patterns), auto_class)
    student = student_of(teacher, [0, 3])
    assert student.config.num_hidden_layers == 2
    for ours, theirs in zip(student.base_model.layers, [teacher.base_model.layers[0], teacher.base_model.layers[3]]):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])
    before = copy.deepcopy(teacher)
    with torch.no_grad():
        next(student.base_model.layers[1].parameters()).zero_()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), teacher.parameters()))
    ids = torch.randint(3, 19, (2, 7))
    same = student_of(teacher, range(4)).eval()
    torch.testing.assert_close(same(ids).logits, teacher.eval()(ids).logits)


def test_a_student_of_layers_that_there_are_not_is_refused():
    teacher = build(tiny("encoder", num_hidden_layers=2), AutoModelForMaskedLM)
    with pytest.raises(ValueError, match=r"`student_layers=\[0, 2\]` must be among the teacher's layers, 0 to 1"):
        student_of(teacher, [0, 2])
