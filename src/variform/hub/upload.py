"""The way to the Hub: what is clear beforehand, the upload itself, and what goes wrong, in one sentence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from .assemble import files_of

# What a loader would take in place of, or besides, what is uploaded: it goes when it is not of this version
REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py"]


def check_repo_id(repo_id: str | None, dry_run: bool) -> None:
    """Raises `ValueError` for a name that no repo can have, or none where one is needed."""
    if repo_id is None:
        if not dry_run:
            raise ValueError("`--repo-id` is missing: name the repo, such as me/my-model, or try with `--dry-run`.")
        return
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`--repo-id {repo_id}` cannot be the name of a repo: {str(error).splitlines()[0]}") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"`--repo-id {repo_id}` must name its owner too, such as me/{repo_id}.")


def check_access() -> None:
    """Raises `ConnectionError` where it is clear beforehand that nothing can be uploaded."""
    if is_offline_mode():
        raise ConnectionError("HF_HUB_OFFLINE is set: unset it to upload, or try with `--dry-run`.")
    if get_token() is None:
        raise ConnectionError("There is no token for the Hub: `hf auth login` stores one, or set HF_TOKEN.")


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    confirm: Callable[[str], bool],
    api: HfApi | None = None,
) -> str:
    """Uploads a folder into a repo, which is made if it does not exist; returns the address.

    Args:
        api: of which Hub; default: the one of the environment.

    Raises:
        ValueError: if `confirm` says no. ConnectionError: if the Hub cannot be reached or refuses, in one sentence.
    """
    api = api or HfApi()
    with hub_errors(repo_id):
        there = [name for name in present_files(api, repo_id, revision) if name != ".gitattributes"]
    question = f"Upload {len(files_of(folder))} files to {repo_id}"
    if there:
        count = "1 file" if len(there) == 1 else f"{len(there)} files"
        question += f", which exists and holds {count}; those of the model are replaced"
    if not confirm(f"{question}?"):
        raise ValueError(f"Nothing was uploaded to {repo_id}{' (it exists)' * bool(there)}: say `--yes` to do so.")
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Upload the model with variform publish",
            delete_patterns=REPLACED if there else None,
        )
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def present_files(api: HfApi, repo_id: str, revision: str | None) -> list[str]:
    """The names of the files in a repo; none if there is no such repo or branch."""
    try:
        return api.list_repo_files(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return []


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what goes wrong between here and the Hub into one sentence: the client's errors are of many kinds."""
    try:
        yield
    except Exception as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        reason = str(
            getattr(error, "server_message", None) or str(error).strip().partition("\n")[0] or type(error).__name__
        )
        if status == 401:
            words = f"The Hub does not know the token: `hf auth login` stores another ({reason})."
        elif status == 403:
            words = f"The token may not write to {repo_id}: take one with the right to write, of its owner ({reason})."
        else:
            words = f"The upload to {repo_id} was cut: {reason.rstrip('.')}. Run the same command again to go on."
        raise ConnectionError(f"{words} Nothing on this machine has changed.") from error
