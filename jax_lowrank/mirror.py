"""A copy of a results folder in a store: gs://, s3://, or what else fsspec knows.

A store can neither rename nor lock, so work happens in a local folder and only whole things are
copied, each a unit: a run, a base model, a checkpoint, a file. URL/complete/UNIT.json is written
last: it makes the unit whole, and carries the SHA-256 of every file. A unit without it is absent,
and one that does not fit is refused by name and written again when it has been made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "s3a": "s3fs", "abfs": "adlfs"}


class MirrorError(OSError):
    """The store could not be read or written; the message says what failed."""


class Mirror:
    """What of `folder` is whole, at `url`; without a url nothing is kept and nothing found.

    note: gets a line for everything that is refused. Raises ValueError for an address that cannot
    be used.
    """

    def __init__(self, url: str | None, folder: Path, note: Callable[[str], None] = print):
        self.url, self.folder, self.note = url, folder, note
        self.refused: set[str] = set()  # units that are damaged there
        if url is not None:
            self.fs, self.root = _open(url)

    # --------------------------------------------------------------------------------- reading

    def fetch(self, unit: str) -> None:
        """Have a unit here as well, if it is whole there and not here yet."""
        place = self.folder / unit
        if self.url is None or unit in self.refused or place.exists():
            return
        with self._doing(f"{unit} could not be read"):
            files = self._files_of(unit)
            wrong = self._take(place, files) if files is not None else ""
        if wrong:
            self.refused.add(unit)
            self.note(f"{self.url}: {unit} is not used: {wrong}")

    def fetch_all(self, group: str) -> None:
        """`fetch` of every unit directly below a group, such as the checkpoints of a run."""
        for unit in self.units(group):
            self.fetch(f"{group}/{unit}")

    def units(self, group: str) -> list[str]:
        """The names of whole units directly below a group."""
        if self.url is None:
            return []
        with self._doing(f"{group} could not be listed"):
            names = self._listed(f"complete/{group}")
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def json_of(self, file: str) -> dict | None:
        """What a JSON file says there; None where there is none that can be read."""
        if self.url is None:
            return None
        with self._doing(f"{file} could not be read"):
            try:
                return json.loads(self.fs.cat_file(f"{self.root}/{file}"))
            except (FileNotFoundError, ValueError):
                return None

    def groups(self, above: str) -> list[str]:
        """The names of all that lies below `above`, whole or not."""
        if self.url is None:
            return []
        with self._doing(f"{above} could not be listed"):
            return self._listed(above)

    def _files_of(self, unit: str) -> dict[str, str] | None:
        """SHA-256 by file, as its parent's folder names it; {}: damaged; None: not whole there."""
        try:
            files = json.loads(self.fs.cat_file(f"{self.root}/complete/{unit}.json"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        own = isinstance(files, dict) and all(_lies_in(name, unit) for name in files)
        return files if own else {}

    def _take(self, place: Path, files: dict[str, str]) -> str:
        """Put these files at `place` if all are what they should be; else what is wrong."""
        if not files:
            return "its list of files is damaged"
        above = self._remote(place).rpartition("/")[0]
        place.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".partial-{place.name}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=place.parent) as partial:
            for name, wanted in files.items():
                file = Path(partial) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.fs.get_file(f"{above}/{name}", str(file))
                except FileNotFoundError:
                    return f"{name} is missing"
                if _hash(file) != wanted:
                    return f"{name} is damaged"
            os.replace(Path(partial) / place.name, place)
        return ""

    # --------------------------------------------------------------------------------- writing

    def push(self, unit: str, *, replace: bool = False) -> None:
        """Have a unit of this folder there, its files first; replace: also where another is."""
        if self.url is None:
            return
        place = self.folder / unit
        with self._doing(f"{unit} could not be written"):
            there = {} if unit in self.refused else self._files_of(unit)
            if there and not replace:
                return
            files = {
                file.relative_to(place.parent).as_posix(): _hash(file)
                for file in ([place] if place.is_file() else sorted(place.rglob("*")))
                if file.is_file()
            }
            if there == files:
                return
            self._remove(unit)
            for name in files:
                remote = self._remote(place.parent / name)
                self.fs.put_file(str(place.parent / name), remote)
            listed = f"{self.root}/complete/{unit}.json"
            self.fs.pipe_file(listed, json.dumps(files).encode())
        self.refused.discard(unit)

    def keep(self, group: str, names: Sequence[str] = ()) -> None:
        """Have exactly these units of a group there, and with them the file GROUP.json if any."""
        if self.url is None:
            return
        if names and (self.folder / f"{group}.json").is_file():
            self.push(f"{group}.json")
        for name in names:
            self.push(f"{group}/{name}")
        with self._doing(f"{group} could not be tidied"):
            for name in set(self._listed(group)).difference(names):
                self._remove(f"{group}/{name}")
            if not names:
                self._remove(group)
                self._remove(f"{group}.json")

    def _remove(self, unit: str) -> None:
        """First what makes it whole."""
        for path in (f"{self.root}/complete/{unit}.json", f"{self.root}/{unit}"):
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(path, recursive=True)

    # ------------------------------------------------------------------------------------------

    def _remote(self, place: Path) -> str:
        return f"{self.root}/{place.relative_to(self.folder).as_posix()}"

    def _listed(self, below: str) -> list[str]:
        """Names in a folder of the store, in order."""
        try:
            paths = self.fs.ls(f"{self.root}/{below}", detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    @contextlib.contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        """Every store has errors of its own: what fails becomes a MirrorError."""
        try:
            yield
        except Exception as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise MirrorError(f"mirror {self.url}: {what}: {reason}") from error


def _open(url: str) -> tuple:
    """The file system of an address, and the path in it. Raises ValueError."""
    from fsspec.core import split_protocol, url_to_fs

    scheme, path = split_protocol(url)
    if scheme is None or not path.strip("/"):
        raise ValueError(f"mirror {url!r} is not an address; give one such as gs://bucket/folder")
    # Other machines write as well: what a listing said before need not be so now.
    options = {"use_listings_cache": False}
    if scheme in ("file", "local"):  # a store has no folders that would have to be made
        options["auto_mkdir"] = True
    try:
        fs, root = url_to_fs(url, **options)
    except ImportError:
        package = PACKAGES.get(scheme, f"what fsspec needs for {scheme}://")
        raise ValueError(f"mirror {url} needs {package}: pip install {package}") from None
    except ValueError as error:
        raise ValueError(f"mirror {url}: {error}; gs://, s3:// and file:// are known") from None
    return fs, root.rstrip("/")


def _lies_in(name: str, unit: str) -> bool:
    """Whether a file's name, from a list that may be damaged, stays inside its unit."""
    parts = PurePosixPath(name).parts
    return bool(parts) and parts[0] == PurePosixPath(unit).name and ".." not in parts


def _hash(file: Path) -> str:
    """SHA-256 of a file, which is then on the disk."""
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
        os.fsync(handle.fileno())
    return digest
