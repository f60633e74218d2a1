"""The rules by which a run of the forms is accepted."""

from verdict import judge

REFERENCE = {
    "decoder__Llama": {"test_rope": "passed", "test_slow": "skipped: slow"},
    "encoder__Bert": {"test_rope": "skipped: CLASS has no rope", "test_mask": "passed"},
}


def against(tests, shape="decoder", whole=False):
    reference = {name: tests for name, tests in REFERENCE.items() if name.startswith(f"{shape}__") or not whole}
    return judge({f"{shape}__form": tests}, reference, whole)


def test_a_form_like_its_reference_is_accepted():
    assert against(REFERENCE["decoder__Llama"], whole=True) == []


def test_a_failure_is_rejected():
    assert against({"test_rope": "failed: wrong"}) == ["decoder__form::test_rope failed: wrong"]


def test_a_failure_where_the_reference_skips_is_rejected():
    assert against({"test_slow": "failed: wrong"}) == ["decoder__form::test_slow failed: wrong"]


def test_a_skip_that_the_reference_has_is_accepted():
    assert against({"test_slow": "skipped: for another reason"}) == []


def test_a_skip_that_another_reference_has_for_the_same_reason_is_accepted():
    assert against({"test_rope": "skipped: CLASS has no rope"}) == []


def test_a_skip_for_a_reason_of_its_own_is_rejected():
    assert against({"test_rope": "skipped: no module of that name"}) == [
        "decoder__form::test_rope skipped: no module of that name"
    ]


def test_passing_more_than_the_reference_is_accepted():
    assert against({"test_rope": "passed", "test_mask": "passed"}, shape="encoder", whole=True) == []


def test_a_test_that_did_not_run_is_rejected():
    assert against({"test_rope": "passed"}, whole=True) == ["decoder__form::test_slow did not run"]


def test_a_shape_of_which_no_form_ran_is_rejected():
    assert judge({}, REFERENCE, whole=True) == ["decoder: no form ran", "encoder: no form ran"]
    assert judge({}, REFERENCE, whole=False) == []


def test_a_test_left_out_by_choice_is_accepted():
    assert against({"test_rope": "passed"}, whole=False) == []
