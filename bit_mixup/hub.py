"""What kept the hub's client from a file, and is what it fetched what the hub published?

The client raises a stand-in where it matters most ("please check your connection", for a 403 as for a 503): what the hub answered
is among its causes. Of what it fetches it compares the size, not the content. While it waits to try again, its logger says so.
It is imported where it is needed, as that takes a second.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_BUSY = (408, 500, 502, 503, 504)


def explain(error: BaseException, *, instead: str, writing: bool = False) -> str | None:
    """What an error of the hub's clients means, and what to do about it.

    Args:
        error: as raised; the first among it and its causes that says something is told.
        instead: what can be done without the hub, such as "give a local path".
        writing: whether something was to be written there, not read.

    Returns:
        Sentences to put behind "the thing asked for: "; None for an error that is not about the hub.
    """
    cause: BaseException | None = error
    while cause is not None:
        if text := _explain(cause, instead, writing):
            return text
        cause = cause.__cause__ or cause.__context__
    return None


def _explain(error: BaseException, instead: str, writing: bool) -> str | None:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    match error:
        case errors.LocalEntryNotFoundError():
            return None  # the stand-in
        case errors.OfflineModeIsEnabled() if writing:
            return f"HF_HUB_OFFLINE forbids to go to the hub. Unset it, or {instead}."
        case errors.OfflineModeIsEnabled():
            return f"it is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it. Unset that once, or {instead}."
        case errors.FileMetadataError():
            return "what answers is not a hub. Check HF_ENDPOINT, the proxy and the firewall."
        case errors.GatedRepoError():
            log_in = "" if error.response.status_code == 403 else ", then log in (`hf auth login`)"
            return f"the repository is gated ({_said(error)}). Accept its terms on its page on the hub{log_in}."
        case errors.RepositoryNotFoundError():
            return "the hub has no such repository, or it is private and you are not logged in (`hf auth login`)."
        case errors.RevisionNotFoundError():
            return "the hub has no such revision. Give a branch, tag or commit that exists."
        case errors.RemoteEntryNotFoundError():
            return "the repository has no such file."
        case errors.HfHubHTTPError():
            return _explain_status(error, writing)
        case httpx.RemoteProtocolError() | httpx.ReadError() | httpx.WriteError():
            kept = "nothing was published" if writing else "whole files that were fetched are kept"
            return f"the connection broke off ({error}). Start again: {kept}."
        case httpx.TransportError() if writing:
            return f"the hub can not be reached ({error}). Check the network and HF_ENDPOINT, or {instead}."
        case httpx.TransportError():
            return (
                f"it is not in the local cache, and the hub can not be reached ({error}). Go online once, set HF_ENDPOINT to a "
                f"mirror, or {instead}."
            )
        case OSError() if str(error).startswith("Consistency check failed"):
            return f"{first_line(error).removeprefix('Consistency check failed: ')} Nothing was kept: start again."
    return None


def _explain_status(error: "HfHubHTTPError", writing: bool) -> str:
    status = error.response.status_code
    if status == 429:
        return (
            f"the hub limits how often you may ask ({_said(error)}). Start again {_when(error)}; it allows more to those who are "
            "logged in (`hf auth login`)."
        )
    if status in _BUSY:
        return f"the hub is busy or down ({_said(error)}). Nothing is wrong on your side: start again {_when(error)}."
    if status == 401:
        return f"the hub does not accept your token ({_said(error)}). Log in anew (`hf auth login`), or mend or unset HF_TOKEN."
    if status == 403:
        may = "write there" if writing else "read this"
        return f"the hub forbids it ({_said(error)}). Check that your account and its token may {may} (`hf auth whoami`)."
    return f"the hub refuses it ({_said(error)}). Check the name and the revision, and HF_ENDPOINT if it is set."


def _said(error: "HfHubHTTPError") -> str:
    """The hub's own words."""
    response = error.response
    return ", ".join(filter(None, [f"{response.status_code} {response.reason_phrase}", response.headers.get("X-Error-Message")]))


def _when(error: "HfHubHTTPError") -> str:
    """When the hub wants to be asked again."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    seconds = str(limit.reset_in_seconds) if limit and not limit.remaining else headers.get("Retry-After", "")
    return f"in {seconds} s" if seconds.isdigit() and int(seconds) else "in a few minutes"


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return str(error).strip().split("\n")[0]


def take_out_if_damaged(file: Path) -> str | None:
    """Compares a file in the client's cache with its published digest, after which the cache names it.

    A damaged file leaves the cache, so that the next attempt fetches it anew. Files are compared at each use, not only when they
    arrive: a gigabyte takes a second, and what a disk spoiled is found too.

    Args:
        file: as the client returned it: a link to the content. Where a cache has no links (some file systems, and Windows
            without the right to make them), and where a digest is neither of git's nor SHA-256, nothing is compared.

    Returns:
        What is wrong, as sentences; None for a whole file.
    """
    if not file.is_symlink():
        return None
    content = file.parent / file.readlink()
    published = content.name
    # Large files go by the SHA-256 of their content, small ones by the name that git gives them.
    kinds = {64: ("SHA-256", hashlib.sha256()), 40: ("git SHA-1", hashlib.sha1(f"blob {content.stat().st_size}\0".encode()))}
    kind, started = kinds.get(len(published), ("", None))
    if started is None:
        return None
    with content.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: started).hexdigest()
    if digest == published:
        return None
    try:
        for path in (content.resolve(), content, file):
            path.unlink(missing_ok=True)
        done = "It was taken out of the cache: start again to fetch it anew."
    except OSError:
        done = f"Remove {content.resolve()} and start again to fetch it anew."
    return f"its {kind} is {digest}, but the hub published {published}: it was damaged on its way or on the disk. {done}"
