"""What is uploaded arrives byte by byte; what was cut goes on; what goes wrong is one sentence, and changes nothing here.

The client is huggingface_hub's own; the Hub is a stand-in on this machine.
"""

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from stand_in import TOKEN, StandIn

from variform.hub.upload import check_access, check_repo_id, upload

FILES = {
    "config.json": b'{"model_type": "variform_decoder"}\n',
    "README.md": "# A model, 3 µm wide\n".encode(),
    "model-00001-of-00002.safetensors": bytes(range(256)) * 9,
    "model-00002-of-00002.safetensors": bytes(range(255, -1, -1)) * 7,
    "modeling_variform.py": b"import torch\n",
    "plots/loss.png": b"\x89PNG" + bytes(100),
}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    disable_progress_bars()
    with StandIn() as hub:
        yield hub
    enable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def send(hub, folder, repo="me/x", token=TOKEN, says=True, **kwargs):
    return upload(folder, repo, confirm=lambda question: says, api=HfApi(hub.url, token=token), **kwargs)


def arrived(hub, repo="me/x", branch="main"):
    return {name: content for name, content in hub.repos[repo][branch].items() if name != ".gitattributes"}


def test_files_arrive_byte_by_byte(hub, folder):
    assert send(hub, folder, private=True) == f"{hub.url}/me/x"
    assert arrived(hub) == FILES
    assert hub.private == {"me/x"}


def test_a_branch_is_made_and_the_main_one_left_alone(hub, folder):
    assert send(hub, folder, revision="v2") == f"{hub.url}/me/x/tree/v2"
    assert arrived(hub, branch="v2") == FILES
    assert arrived(hub) == {}
    send(hub, folder, revision="v2")


def test_an_upload_that_was_cut_goes_on(hub, folder):
    hub.room_for = 1
    with pytest.raises(ConnectionError, match=r"me/x was cut: .*Run the same command again") as caught:
        send(hub, folder)
    assert "\n" not in str(caught.value)
    assert arrived(hub) == {} and len(hub.objects) == 1
    hub.room_for = None
    send(hub, folder)
    assert arrived(hub) == FILES
    assert set(hub.uploads.values()) == {1}  # what had arrived was not sent again
    assert contents(folder) == FILES


def test_weights_and_code_of_an_earlier_version_go(hub, folder):
    old = {"model.safetensors": b"old", "moe.py": b"old", "pytorch_model.bin": b"old", "notes.txt": b"mine"}
    hub.repos["me/x"] = {"main": {**old, "config.json": b"old"}}
    send(hub, folder)
    assert arrived(hub) == {**FILES, "notes.txt": b"mine"}


@pytest.mark.parametrize("there", [{}, {"config.json": b"another"}])
def test_nothing_is_uploaded_without_a_yes(there, hub, folder):
    if there:
        hub.repos["me/x"] = {"main": dict(there)}
    with pytest.raises(ValueError, match=r"Nothing was uploaded to me/x( \(it exists\))?: say `--yes`"):
        send(hub, folder, says=False)
    assert hub.repos == ({"me/x": {"main": there}} if there else {})


def test_the_question_says_that_a_repo_exists(hub, folder):
    asked = []
    hub.repos["me/x"] = {"main": {"config.json": b"another"}}
    upload(folder, "me/x", confirm=lambda question: asked.append(question) or True, api=HfApi(hub.url, token=TOKEN))
    assert asked == ["Upload 6 files to me/x, which exists and holds 1 file; those of the model are replaced?"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ({"token": "hf_wrong"}, "does not know the token"),
        ({"repo": "you/x"}, "may not write to you/x"),
    ],
)
def test_a_refusal_is_one_sentence(case, words, hub, folder):
    with pytest.raises(ConnectionError, match=words) as caught:
        send(hub, folder, **case)
    assert str(caught.value).endswith("Nothing on this machine has changed.") and "\n" not in str(caught.value)
    assert hub.repos == {} and contents(folder) == FILES


def test_a_hub_that_is_not_there_is_one_sentence(hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client's own patience
    api = HfApi("http://127.0.0.1:9", token=TOKEN)  # nobody listens on the discard port
    with pytest.raises(ConnectionError, match=r"me/x was cut: .*refused") as caught:
        upload(folder, "me/x", confirm=lambda question: True, api=api)
    assert "\n" not in str(caught.value)


def test_offline_and_without_a_token_are_known_beforehand(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set: unset it"):
        check_access()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("variform.hub.upload.get_token", lambda: None)
    with pytest.raises(ConnectionError, match="no token for the Hub: `hf auth login`"):
        check_access()


@pytest.mark.parametrize("name", ["x", "me/my model", "me/x/y", "me/--x", None])
def test_a_name_that_no_repo_can_have_is_refused(name):
    with pytest.raises(ValueError, match="`--repo-id"):
        check_repo_id(name, dry_run=False)
    check_repo_id(None, dry_run=True)
