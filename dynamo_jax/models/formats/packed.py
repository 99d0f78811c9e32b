"""A weight that several stored tensors hold: the pieces that the formats share.

A format looks at the tensors of one module, says which of them it reads and what shape of floats they are, and gives
the function that decodes them (``Packed``). It refuses what does not fit, in one line that names file and tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float

from dynamo_jax.files import shortened, shown
from dynamo_jax.models.formats.tensor_files import FLOATS, Header

E8M0 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)  # powers of two; 255 is NaN
POWERS = ("U8", "F8_E8M0")  # dtypes of scales that are exponents


class Packed(NamedTuple):
    """A weight as it is stored. words: the format. shape: of the floats. parts: names of the tensors that are read, in
    the order in which ``decode`` takes them. Of a fused one, the first axis counts experts, and parts that have it
    are cut there, so that an expert can be read alone. decode gives float32, or what is turned into it."""

    words: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    decode: Callable[..., np.ndarray]


class Module:
    """The stored tensors of one module, by what follows ``stem`` in their names: ``weight`` is X.weight where the stem
    is "X.", and ``scales`` is X_scales where it is "X_". codes: the name of the tensor of the weight's codes."""

    def __init__(self, headers: Mapping[str, Header], listing: Path, stem: str, codes: str):
        self._headers, self._listing, self.stem, self.codes = headers, listing, stem, codes

    def __contains__(self, leaf: str) -> bool:
        return self.stem + leaf in self._headers

    def found(self, leaves: tuple[str, ...]) -> str:
        """The one of these that is there. ValueError: none is, or several, which cannot be told apart."""
        there = [leaf for leaf in leaves if self.stem + leaf in self._headers]
        if len(there) > 1:
            both = " and ".join(self.stem + leaf for leaf in there)
            raise self.wrong(self.codes, f"has {both}: which of them scales it cannot be told")
        if not there:
            names = " or ".join(self.stem + leaf for leaf in leaves)
            raise self.wrong(self.codes, f"({self._headers[self.codes].dtype}) needs {names}, which is missing")
        return there[0]

    def of_codes(self, *dtypes: str) -> tuple[int, ...]:
        """The shape of the codes, which are there and have one of these dtypes."""
        shape = self._checked(self.codes, dtypes)
        if 0 in shape:
            raise self.wrong(self.codes, f"is {shape}, which holds nothing")
        return shape

    def shape(self, leaf: str, *dtypes: str) -> tuple[int, ...]:
        """The shape of another tensor of the module. ValueError: it is missing or of none of these dtypes."""
        return self._checked(self.stem + self.found((leaf,)), dtypes)

    def dtype(self, leaf: str) -> str:
        return self._headers[self.stem + leaf].dtype

    def check(self, leaf: str, shape: tuple[int, ...], why: str, *dtypes: str) -> None:
        """ValueError unless the tensor is there with this shape."""
        if (found := self.shape(leaf, *dtypes)) != shape:
            raise self.wrong(self.stem + leaf, f"is {shown(found)}, expected {shape} {why}")

    def _checked(self, name: str, dtypes: tuple[str, ...]) -> tuple[int, ...]:
        header = self._headers[name]
        if header.dtype not in dtypes:
            raise self.wrong(name, f"is {header.dtype}, expected {' or '.join(dtypes)}")
        return header.shape

    def wrong(self, name: str, said: str) -> ValueError:
        header = self._headers.get(name)
        return ValueError(f"{header.file if header else self._listing}: {shortened(name)} {said}")


def scale_values(scales: np.ndarray) -> Float[np.ndarray, "*S"]:
    """float32 from scales in any dtype that they are stored in; bytes are exponents of two, E8M0."""
    return E8M0[scales] if scales.dtype == np.uint8 else scales.astype(np.float32)


SCALES = (*FLOATS, *POWERS)
