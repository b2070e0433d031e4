"""Push a frozen checkpoint to the Hugging Face Hub: only on request, private by default, and only listed files.

No run and no notebook calls this. Only `alignkit push` does, for one folder, after it has shown the files.
"""

from __future__ import annotations

import glob
from dataclasses import dataclass
from pathlib import Path

from alignkit.errors import AlignkitError
from alignkit.publish.card import card_is_of, write_card
from alignkit.runs.frozen import MANIFEST, verify
from alignkit.safe_text import one_line
from alignkit.stages import CARD

LOG_IN = ("there is no token of the Hub on this machine that may write: `hf auth login` asks for one and keeps it, or "
          "set HF_TOKEN for this command alone")


class PushError(AlignkitError, RuntimeError):
    """Nothing was pushed, or only a part; the message says why and what to do."""


@dataclass(frozen=True)
class Parcel:
    """The content of a push: `files` name -> bytes, from `folder`, to the repository `repo`, private or public."""

    folder: Path
    repo: str
    private: bool
    files: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{size:16,} bytes   {one_line(name)}" for name, size in self.files.items()]
        seen = "private: you, and whom you let in" if self.private else "PUBLIC: everybody"
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes"
        return "\n".join((*lines, f"{total}, to {self.repo} ({seen})"))


def parcel(checkpoint: str | Path, repo: str, *, private: bool = True, licence: str | None = None) -> Parcel:
    """The content of a push of a frozen checkpoint: the manifest, the files that it lists, and the model card.

    The card is written if it is missing, or if `licence` is given. Raises ManifestError if a byte of the checkpoint has
    changed since freezing, and PushError if `repo` is not a valid repository name, or if the card belongs to another
    checkpoint.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    folder = Path(checkpoint)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PushError(f"{one_line(repo)!r} is no name of a repository, expected OWNER/NAME: {error}") from None
    manifest = verify(folder)
    if licence is not None or not (folder / CARD).exists():
        write_card(folder, licence=licence)
    if not card_is_of(folder, manifest):
        raise PushError(f"{folder / CARD} is not the card of this checkpoint: it does not name its manifest's hash. "
                        f"Write it anew with `alignkit card {folder}`")
    names = [*sorted(manifest.files), MANIFEST, CARD]
    return Parcel(folder, repo, private, {name: (folder / name).stat().st_size for name in names})


def send(what: Parcel) -> str:
    """Push the parcel; returns the address of the commit. Creates the repository if it does not exist.

    Raises PushError without a token, if the Hub cannot be reached or refuses, and if the existing repository is public
    but the parcel is private.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if get_token() is None:
        raise PushError(f"nothing was pushed: {LOG_IN}")
    api = HfApi()
    try:
        repo = api.create_repo(what.repo, private=what.private, exist_ok=True).repo_id
        if what.private and not api.repo_info(repo).private:
            raise PushError(f"nothing was pushed: {repo} is there already and public. Say --public, or choose another "
                            "name")
        commit = api.upload_folder(repo_id=repo, folder_path=what.folder, commit_message="Frozen checkpoint (alignkit)",
                                   allow_patterns=[glob.escape(name) for name in what.files])
    except OfflineModeIsEnabled:
        raise PushError("nothing was pushed: HF_HUB_OFFLINE is set; unset it for this command") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        why = f" ({LOG_IN})" if status in (401, 403) else ""
        raise PushError(f"the Hub refused: {one_line(error, 600)}{why}") from error
    except PushError:
        raise
    except Exception as error:  # no connection, or it broke: in every case the push is incomplete
        raise PushError(f"the Hub could not be reached, or the push broke off: {one_line(error, 600)}. Give the same "
                        "command again") from error
    return str(commit)


def push(checkpoint: str | Path, repo: str, *, public: bool, licence: str | None, ask) -> None:
    """The command `alignkit push`: show the files, ask, and push. ask: () -> whether to continue."""
    what = parcel(checkpoint, repo, private=not public, licence=licence)
    print(what, flush=True)
    if not ask():
        print("nothing was pushed")
        return
    print(f"pushed: {one_line(send(what), 1000)}")
