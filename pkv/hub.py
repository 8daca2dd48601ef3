"""Models by name: a directory of this machine, or a repository of the Hugging Face hub at one commit. No jax here.

Fetched are configs, tokenizers and the weight files that a caller names; never code, never pickles. One commit serves
the whole process, whatever is pushed meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from pkv.config import UnavailableError, UserError

_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # configs and tokenizers
_NOT_HERE = "not in this machine's hub cache, and HF_HUB_OFFLINE forbids to fetch it; fetch it once online"
_INNER_FOLDERS = "*/*"  # other formats, copies of the original, pipelines: nothing of a checkpoint lies there


def find_checkpoint(source: str | Path) -> Path:
    """The directory of a checkpoint; what is no directory but looks like `owner/name` or `owner/name@revision` is
    fetched from the hub, or found in its cache, without its weights. Raises UserError.
    """
    directory = Path(source)
    return directory if directory.is_dir() else _snapshot(*_hub_id(source))


def fetch(source: str | Path, files: Iterable[str]) -> None:
    """Bring these files, too, into the directory that `find_checkpoint` gives. Raises UserError naming one that the
    repository lacks; what a directory of this machine lacks is for its reader to say.
    """
    if Path(source).is_dir():
        return
    repository, revision = _hub_id(source)
    directory = _snapshot(repository, revision)
    if _missing(directory, files):
        _download(repository, directory.name, files)
    if missing := _missing(directory, files):
        if _offline():
            raise UserError(f"{source}: {missing[0]} is {_NOT_HERE}")
        raise UserError(
            f"{source}: the hub gave no {missing[0]}; pkv reads safetensors only, never pickles (*.bin, *.pt)"
        )


def pinned(source: str | Path) -> str:
    """A name that always means the same: `owner/name@commit` for what comes from the hub, or a whole path."""
    if Path(source).is_dir():
        return str(Path(source).resolve())
    repository, revision = _hub_id(source)
    return f"{repository}@{_snapshot(repository, revision).name}"


def name_and_revision(source: str | Path) -> tuple[str, str | None]:
    """What other programs call a model: a directory, or apart the hub's repository and revision."""
    found = None if Path(source).is_dir() else _HUB_ID.fullmatch(str(source))
    return (str(source), None) if found is None else (found[1], found[2])


def _hub_id(source: str | Path) -> tuple[str, str | None]:
    """Repository and revision."""
    found = _HUB_ID.fullmatch(str(source))
    if found is None or Path(source).exists():
        raise UserError(
            f"{source}: no such directory; expected a Hugging Face directory, or a hub id such as owner/name "
            "or owner/name@revision"
        )
    return found[1], found[2]


@lru_cache(maxsize=32)
def _snapshot(repository: str, revision: str | None) -> Path:
    """The directory of a revision in the hub's cache; its name is the commit that the revision means now."""
    return _download(repository, revision, _SMALL_FILES)


def _download(repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download  # here, because only hub ids need it

    name = repository if revision is None else f"{repository}@{revision}"
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=[_INNER_FOLDERS]
            )
        )
    except Exception as error:  # the network: what the hub's libraries raise has no kind in common
        if _offline():
            raise UserError(f"{name}: no such directory; {_NOT_HERE}, or name a directory") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if mistake := _mistake(error, reason, repository):
            raise UserError(f"{name}: {mistake}") from error
        raise UnavailableError(
            f"{name}: the hub did not give it: {reason}; check the connection and give the command again"
        ) from error


def _mistake(error: Exception, reason: str, repository: str) -> str | None:
    """Why the hub gave nothing, and what to do, in one line; None where it is the network's doing."""
    from huggingface_hub import errors

    login = "log in by `hf auth login` or set HF_TOKEN"
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError):
        return f"access is restricted; ask for it at https://huggingface.co/{repository} and {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such directory, and the hub has no such repository, or a private one; correct the name, or {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision of it; correct what stands behind @ or leave it out"
    if status in (401, 403):
        return f"the hub refuses access: {reason}; {login}"
    if any(words in str(error) for words in ("No space left", "quota exceeded")):
        return f"no room for it on the disk: {reason}; free some, or set HF_HOME to a directory with more"
    if isinstance(error, PermissionError):
        return f"the hub's cache cannot be written: {reason}; set HF_HOME to a directory of your own"
    return None


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _missing(directory: Path, files: Iterable[str]) -> list[str]:
    return sorted(file for file in files if not (directory / file).is_file())
