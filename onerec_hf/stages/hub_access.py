"""What can be known of a push to the Hub before the work that it comes after."""

import re

from accelerate import PartialState
from huggingface_hub import HfApi

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def require_repositories(**repositories: str | None) -> None:
    """Raises ValueError for an option that names no repository of the Hub, or one that another option names."""
    named: dict[str, str] = {}
    for option, repository in repositories.items():
        if repository is None:
            continue
        if REPOSITORY.fullmatch(repository) is None or ".." in repository:
            raise ValueError(f"{option} must be a repository such as name/model, got {repository!r}.")
        if repository in named:
            raise ValueError(f"{option} and {named[repository]} are both {repository}: give each its own repository.")
        named[repository] = option


def require_login(*repositories: str | None) -> None:
    """Raises ValueError if there is a repository to push to and the Hub does not know who pushes."""
    if not any(repositories) or not PartialState().is_main_process:
        return
    try:
        HfApi().whoami()
    except Exception as error:  # no token, one that is not known, no network, offline mode: all of them end the push
        raise ValueError(
            f"{', '.join(filter(None, repositories))} cannot be pushed to: {error} Log in by `hf auth login` or with "
            "HF_TOKEN, without HF_HUB_OFFLINE, or leave out the hub_ options and push later by the same command."
        ) from None
