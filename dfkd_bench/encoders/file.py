"""``file:PATH``: a matrix [K, d] of the user's, in a .npy or .safetensors file."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from safetensors import safe_open

from dfkd_bench.encoders import RowEncoder, Rows, file_sha256, first_line
from dfkd_bench.errors import UserError
from dfkd_bench.paths import expanded


class File(RowEncoder):
    """Read whenever it is asked for; nothing of it is kept."""

    expected: ClassVar[str] = "'file:PATH' with a .npy or .safetensors file"

    def __init__(self, name: str, argument: str = "") -> None:
        super().__init__(name, argument)
        if not argument:
            raise UserError(f"text encoder 'file' names no file: expected {self.expected}")
        self.file = expanded(argument)
        self.path = str(self.file)

    @property
    def model(self) -> str:
        """The file's name, without its folder."""
        return self.file.name

    @property
    def revision(self) -> str:
        """Hash of the file."""
        return f"sha256:{file_sha256(self.file)}"

    def rows(self, classes: int) -> Rows:
        """``UserError``: no such file, not one matrix of floats with a row for each class, or not finite."""
        path = self.file
        if path.suffix not in (".npy", ".safetensors"):
            raise UserError(f"can't read embeddings from {path}: expected {self.expected}")
        try:
            if path.suffix == ".npy":
                matrix = np.load(path, allow_pickle=False)
            else:
                with safe_open(path, framework="numpy") as file:
                    (name,) = file.keys()
                    matrix = file.get_tensor(name)
            if not isinstance(matrix, np.ndarray):  # an .npz by another name
                raise TypeError("it is no single array")
        except Exception as error:  # both readers raise many kinds for what isn't theirs
            raise UserError(f"can't read one matrix [{classes}, d] from {path}: {first_line(error)}") from None
        shape, numeric = list(matrix.shape), np.issubdtype(matrix.dtype, np.floating)
        if len(shape) != 2 or shape[0] != classes or shape[1] < 1 or not numeric:
            raise UserError(
                f"{path} holds {matrix.dtype} {shape}: expected floats [{classes}, d], one row for each class"
            )
        with np.errstate(over="ignore"):  # what is too large becomes infinite
            rows = np.ascontiguousarray(matrix, dtype=np.float32)
        if not np.isfinite(rows).all():
            raise UserError(f"{path} holds values that are not finite in float32: expected floats [{classes}, d]")
        return rows
