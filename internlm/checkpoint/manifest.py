"""The manifest: what a complete checkpoint consists of, and the search for checkpoints that are whole."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from internlm.checkpoint.storage import Storage, patiently
from internlm.checkpoint.tensor_file import FileRecord, read_header

MANIFEST = "manifest.json"
FORMAT = "internlm-checkpoint"
VERSION = 1
PLACES = ("", "checkpoints/", "snapshot/", "checkpoints/snapshot/")  # of checkpoints below a run's or their own folder
_FOLDER = re.compile(r"(\d+)(\.replaced-\w+)?")


class BrokenCheckpointError(Exception):
    """A checkpoint that must not be loaded. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    step: int
    kind: str  # normal or snapshot
    token: str  # of the save; stands in every shard's header too
    saved_at: str  # ISO 8601, UTC
    world: dict[str, int]  # layout of the ranks that wrote; for information only
    files: dict[str, FileRecord]

    def render(self) -> bytes:
        """The one text of this manifest; `parse` refuses any other, so that a flipped bit can't hide in it."""
        about = {"format": FORMAT, "version": VERSION, **asdict(self)}
        body = json.dumps(about, indent=1, sort_keys=True)
        digest = hashlib.sha256(body.encode()).hexdigest()
        return f"{body}\n{json.dumps({'sha256_of_the_above': digest})}\n".encode()

    @staticmethod
    def parse(text: bytes) -> "Manifest":
        """Raises BrokenCheckpointError."""
        try:
            body = text.decode().rstrip("\n").rpartition("\n")[0]
            about: dict[str, Any] = json.loads(body)
            if about.pop("format") != FORMAT:
                raise BrokenCheckpointError(f"{MANIFEST} is not one of an {FORMAT}")
            version = about.pop("version")
            if version != VERSION:
                raise BrokenCheckpointError(f"{MANIFEST} has format version {version}, this program reads {VERSION}")
            files = {name: FileRecord(**record) for name, record in about.pop("files").items()}
            manifest = Manifest(files=files, **about)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenCheckpointError(f"{MANIFEST} is damaged ({error})") from error
        if manifest.render() != text:
            raise BrokenCheckpointError(f"{MANIFEST} is damaged (its own checksum differs)")
        return manifest


def list_checkpoints(storage: Storage) -> list[tuple[int, str]]:
    """(step, folder) of everything that looks like a checkpoint, newest first; unfinished ones are not listed.

    In an object store a folder without a manifest is an unfinished one; on a disk it was renamed into place with its
    manifest, so a missing one means damage.
    """
    found = []
    for name in storage.names():
        match = _FOLDER.fullmatch(name)
        if match and (storage.is_local or MANIFEST in storage.names(name)):
            found.append((int(match[1]), name))
    return sorted(found, key=lambda item: (-item[0], len(item[1])))


def read_manifest(storage: Storage, folder: str) -> Manifest:
    """The manifest, checked against the folder's list of files. Raises BrokenCheckpointError."""
    names = set(storage.names(folder))
    if MANIFEST not in names:
        raise BrokenCheckpointError(f"{MANIFEST} is missing")
    try:
        manifest = Manifest.parse(bytes(patiently(partial(storage.read, f"{folder}/{MANIFEST}"))))
    except OSError as error:
        raise BrokenCheckpointError(f"{MANIFEST} can't be read ({error})") from error
    if match := _FOLDER.fullmatch(folder.rpartition("/")[2]):
        step = int(match[1])
        if step != manifest.step:
            raise BrokenCheckpointError(f"{MANIFEST} is of step {manifest.step}, not of step {step}")
    foreign = sorted(name for name in names - set(manifest.files) if name.endswith(".safetensors"))
    if foreign:
        raise BrokenCheckpointError(f"{foreign[0]} is foreign: the manifest doesn't list it")
    return manifest


def check_files(storage: Storage, folder: str, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """What is wrong with some of a checkpoint's files; empty when all are as they were written."""
    problems = []
    for name in names:
        try:
            problem = patiently(partial(_problem, storage, f"{folder}/{name}", manifest.files[name], manifest.token))
        except FileNotFoundError:
            problem = "is missing"
        except OSError as error:
            problem = f"can't be read ({error})"
        if problem:
            problems.append(f"{name} {problem}")
    return problems


def _problem(storage: Storage, path: str, record: FileRecord, token: str) -> str | None:
    size = storage.size(path)
    if size != record.size:
        return f"has {size} bytes instead of {record.size}" + (" (truncated)" if size < record.size else "")
    digest = hashlib.sha256()
    for chunk in storage.chunks(path):
        digest.update(chunk)
    if digest.hexdigest() != record.sha256:
        return f"was changed: its sha256 is {digest.hexdigest()[:12]}... instead of {record.sha256[:12]}..."
    if path.endswith(".safetensors"):
        _, metadata = read_header(storage, path)
        if metadata.get("token") != token:
            return f"is foreign: it belongs to save {metadata.get('token')}, the manifest to save {token}"
    return None
