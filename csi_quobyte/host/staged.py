"""Notes of what this node has staged: for which volume and attachment a key's device and daemon were made.

The kernel and QMP say what is there; they cannot say for which attachment. The note is written before anything is
started and removed after everything has ended, so a device without a note, or with another generation, is stale.

A second kind says that a read-only bind mount is being made, which takes two steps: a writable one that is found with
it is half of one, not somebody's.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from csi_quobyte.errors import Unavailable


@dataclass(frozen=True)
class StagedNote:
    """One staged volume, and the generation of the attachment that it was staged for."""

    volume_id: str
    generation: int
    uid: str = ""
    """Of the volume's record: another volume of the same id begins its generations anew."""

    def is_of(self, uid: str, generation: int) -> bool:
        """Say whether this is the note of that attachment of that volume; one of an earlier version has no uid."""
        return self.generation == generation and self.uid in ("", uid)


class StagedNotes:
    """The notes in one state directory; one process at a time uses it."""

    def __init__(self, state_dir: str) -> None:
        self._directory = Path(state_dir) / "staged"

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.json"

    def put(self, key: str, note: StagedNote) -> None:
        """Write the note of a key, whole or not at all. It means nothing after a reboot, so it is not synced.

        Raises:
            Unavailable: the state directory cannot be written.
        """
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            unfinished = self._path(key).with_suffix(".tmp")
            unfinished.write_text(json.dumps(vars(note)), encoding="utf-8")
            os.replace(unfinished, self._path(key))
        except OSError as error:
            raise Unavailable(f"{self._directory} cannot be written: {error.strerror}") from error

    def find(self, key: str) -> StagedNote | None:
        """Give the note of a key; None when there is none, or one that is torn.

        Raises:
            Unavailable: the state directory cannot be read: that is no word that nothing is staged.
        """
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
            return StagedNote(str(found["volume_id"]), int(found["generation"]), str(found.get("uid", "")))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unavailable(f"{self._path(key)} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError):
            return None

    def _binding_path(self, key: str, target: str) -> Path:
        return self._directory / f"{key}-{hashlib.sha256(target.encode()).hexdigest()[:16]}.binding"

    def begin_binding(self, key: str, target: str) -> None:
        """Note that a read-only bind mount is about to be made at a target.

        Raises:
            Unavailable: the state directory cannot be written.
        """
        try:
            self._binding_path(key, target).touch(mode=0o600)
        except OSError as error:
            raise Unavailable(f"{self._directory} cannot be written: {error.strerror}") from error

    def is_binding(self, key: str, target: str) -> bool:
        """Say whether a read-only bind mount was begun at a target and not ended."""
        return self._binding_path(key, target).exists()

    def end_binding(self, key: str, target: str) -> None:
        """Forget that a bind mount was begun; done before is success."""
        self._binding_path(key, target).unlink(missing_ok=True)

    def remove(self, key: str) -> None:
        """Forget a key; done before is success."""
        self._path(key).unlink(missing_ok=True)

    def keys(self) -> list[str]:
        """Give the keys that have a note, sorted."""
        return sorted(path.stem for path in self._directory.glob("*.json"))
