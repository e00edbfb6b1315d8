"""Whether the Hugging Face hub answers, asked once before anything is fetched: its libraries ask again and again for
half a minute and more before they give up."""

from pathlib import Path
from typing import Literal

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from sae.errors import InputError

SECONDS_TO_ANSWER = 5


def require_hub(repo: str, kind: Literal["model", "dataset"], message: str) -> None:
    """Raises InputError where nothing of a repository is in the cache and the hub does not answer, and for what can be
    no name there.

    Args:
        repo: `owner/name`.
        kind: of the repository.
        message: of the error, with `{reason}`.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(
            f"no {kind} at {repo!r}: no such file or folder, and no name of a {kind} on the Hugging Face hub, which is "
            "OWNER/NAME in letters, digits, '-', '_' and '.'"
        ) from None
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind) / "snapshots"
    if constants.HF_HUB_OFFLINE or (snapshots.is_dir() and any(snapshots.iterdir())):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, "README.md", repo_type=kind), timeout=SECONDS_TO_ANSWER)
    except (HfHubHTTPError, ValueError):
        # It answers; what it says about the name is told where the repository is read.
        return
    except Exception as error:  # of the transport: no name server, no route, a timeout, a proxy
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(message.replace("{reason}", reason)) from None
