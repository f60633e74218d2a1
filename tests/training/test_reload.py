"""A model that cannot be loaded in a new process is reported, with the reason."""

import pytest

from variform.training.reload import answers_of_new_process


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=str(tmp_path)):
        answers_of_new_process(tmp_path, ["cat"], remote_code=True)
