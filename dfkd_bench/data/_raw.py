"""Which raw files a data set wants, and where they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Raw:
    """Which raw files a data set wants and where they are looked for."""

    train: tuple[str, ...] = ()  # files or folders, relative to one of ``folders``
    test: tuple[str, ...] = ()
    folders: tuple[str, ...] = (".",)  # below the data root; absolute ones as they are
    archive: str = ""  # a tar.gz that holds all of them
    address: str = ""  # where the files (or the archive) are downloaded from; empty: by hand
    advice: str = ""  # what else the user can do
    checksums: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)  # file -> its accepted md5 sums

    def candidates(self, root: Path, file: str) -> list[Path]:
        """Every path at which ``file`` may be, in the order of search."""
        return [root / folder / file for folder in self.folders]

    def find(self, root: Path, file: str) -> Path | None:
        """The first of them that exists."""
        return next((path for path in self.candidates(root, file) if path.exists()), None)

    def own_folders(self, root: Path) -> list[Path]:
        """Every folder that holds raw files of this data set alone: not those that ``folders`` names, such as the data
        root."""
        tops = dict.fromkeys(Path(file).parts[0] for file in self.train + self.test)
        return [path for top in tops for path in self.candidates(root, top) if path.is_dir()]

    def at_hand(self, root: Path) -> bool:
        """True if all files, or the archive, exist. Looks at names only."""
        if self.archive and self.find(root, self.archive):
            return True
        return all(self.find(root, file) for file in self.train + self.test)

    def looked_for(self, root: Path) -> str:
        """One line: the files and the folders they were looked for in."""
        wanted = ", ".join(dict.fromkeys(self.train + self.test))
        either = f"{self.archive} or " if self.archive else ""
        folders = ", ".join(str((root / folder).resolve()) for folder in self.folders)
        return f"{either}{wanted} in one of the folders {folders}"
