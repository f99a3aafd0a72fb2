"""One file from the Hugging Face Hub: `config.json` of a repository, or one clear reason why not.

`huggingface_hub` is imported here only, inside a function, and obeys HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
by itself. What is in its local cache is used when the Hub cannot be asked.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vramplan.errors import InputError, VramplanError

REQUEST_TIMEOUT_S = 5.0
DEADLINE_S = 10.0  # for everything: name resolution can hang longer than any request's own timeout
_INSTEAD = "pass the path of its config.json, or a built-in name (vramplan models)"

T = TypeVar("T")


def fetch_config(repo_id: str) -> Path:
    """The local copy of `config.json` of a Hub repository ("org/name"), downloaded unless cached.

    Raises InputError for a gated, missing or unreadable repository, VramplanError when the Hub cannot be reached;
    after `DEADLINE_S` at the latest.
    """
    try:
        return within(DEADLINE_S, lambda: _fetch(repo_id))
    except VramplanError:
        raise
    except Exception as error:  # whatever a proxy, a mirror or a broken disk makes the library raise
        raise explain(repo_id, error) from None


def _fetch(repo_id: str) -> Path:
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]
    except ImportError:
        raise VramplanError("huggingface_hub is not installed", "pip install huggingface-hub") from None
    disable_progress_bars()
    # `hf_hub_download` alone repeats a refused connection for 23 seconds; one question first tells at once.
    problem: Exception | None = None
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, "config.json"), timeout=REQUEST_TIMEOUT_S)
    except Exception as error:
        problem = error
    try:
        return Path(hf_hub_download(repo_id, "config.json", local_files_only=problem is not None))
    except Exception as error:
        raise problem or error from None


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises. TimeoutError when it takes longer; its thread is then left behind."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def explain(repo_id: str, error: Exception) -> VramplanError:
    """The error to show for one that `huggingface_hub` (any version since 0.30) raised."""
    from huggingface_hub import errors as hub

    page = f"https://huggingface.co/{repo_id}"
    if isinstance(error, hub.GatedRepoError):  # before RepositoryNotFoundError, its parent
        return InputError(
            f"{repo_id} is gated on the Hub", f"accept the licence on its page ({page}) and set HF_TOKEN, or {_INSTEAD}"
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return InputError(
            f"{repo_id} is neither a file here nor a repository on the Hub",
            f"check the spelling; for a private repository set HF_TOKEN; or {_INSTEAD}",
        )
    if isinstance(error, hub.HFValidationError):
        return InputError(f"{repo_id!r} is not a name that a Hub repository can have", _INSTEAD)
    if isinstance(error, hub.EntryNotFoundError) and not isinstance(error, hub.LocalEntryNotFoundError):
        return InputError(f"{repo_id} on the Hub has no config.json", _INSTEAD)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return InputError(f"the Hub refused the token for {repo_id}", f"set a valid HF_TOKEN, or {_INSTEAD}")
    reason = f"answered {status}" if status else _reason(error)
    return VramplanError(f"Hub unreachable: could not get config.json of {repo_id} ({reason})", _INSTEAD)


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if name == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, TimeoutError):
        return f"no answer in {DEADLINE_S:g} s"
    return name
