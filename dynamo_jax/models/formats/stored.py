"""Whatever a folder's weights are stored in, here they are floats by logical name, one tensor or expert at a time.

A weight that other tools packed into several tensors is one bfloat16 ``X.weight`` in the listing (``X`` where a family
has it without the last word): its codes are decoded in float32 and rounded once. Which format a weight is in is said
by the names and dtypes of the tensors around it, and what these leave open by config.json (``declared.py``). Other
tensors are as they lie in the file. Scales of activations and of caches are not listed: only engines that round
activations, too, have a use for them.

A tensor beside a packed weight that no format here knows, and scales of a weight that is not packed, are errors: the
weight may mean something else than is read.
"""

from __future__ import annotations

import math
from pathlib import Path

import ml_dtypes
import numpy as np

from dynamo_jax.files import shortened
from dynamo_jax.models.formats.declared import Declared
from dynamo_jax.models.formats.fp4 import fp4_weight, mxfp4_experts
from dynamo_jax.models.formats.fp8 import fp8_weight
from dynamo_jax.models.formats.integers import awq_weight, bytes_weight, gptq_weight, packed_weight
from dynamo_jax.models.formats.packed import Module, Packed
from dynamo_jax.models.formats.tensor_files import FLOATS, Header, TensorFiles, is_finite

FP8 = ("F8_E4M3", "F8_E5M2")
NARROW = (*FP8, "U8", "I8")
ACTIVATIONS = {
    *("input_scale", "activation_scale", "input_global_scale", "input_zero_point", "input_amax", "output_scale"),
    *("output_zero_point", "k_scale", "v_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point"),
}
FUSED_ACTIVATIONS = ("_activation_scale", "_input_scale")
STRAYS = {
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point"),
    *("weight_shape", "qzeros", "g_idx", "weight_g_idx"),
}
WORDS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class StoredTensors:
    """The tensors in ``folder`` by logical name.

    headers: of all of them, bfloat16 where they are packed. listing: the file that says which tensors there are.
    respelled: pieces of names in some files, and what stands there in logical names.
    ValueError, which names file and tensor: as ``TensorFiles``; codes without their scales, of another shape or dtype
    than the format has, or whose format cannot be told.
    """

    def __init__(self, folder: Path, said: Declared, respelled: dict[str, str] | None = None):
        self._files = TensorFiles(folder)
        self._respelled = respelled or {}
        self._filed: dict[str, str] = {}  # logical names, and what the file has, of tensors that are not packed
        self._said = said
        self.listing = self._files.listing
        self.packed: dict[str, Packed] = {}
        self.headers: dict[str, Header] = {}
        modules: dict[str, str] = {}  # what precedes the tensors of a packed weight, and the tensor of its codes
        for name, header in self._files.headers.items():
            if found := self._recognised(name, header):
                logical, packed, stem = found
                self._add(logical, packed, header)
                modules[stem] = name
        self.release()
        parts = {part for packed in self.packed.values() for part in packed.parts}
        fused = tuple(stem for stem in modules if stem.endswith("_"))
        for name, header in self._files.headers.items():
            if name not in parts and not self._is_of_activations(name):
                self._check_alone(name, modules, fused)
                logical = self._logical(name)
                if logical in self.packed:
                    raise ValueError(f"{header.file}: {shortened(name)} is there twice, as floats and packed")
                if logical in self._filed:
                    raise ValueError(f"{header.file}: {shortened(name)} is there twice, as {self._filed[logical]} too")
                self._filed[logical] = name
                self.headers[logical] = header

    def _logical(self, name: str) -> str:
        for theirs, ours in self._respelled.items():
            name = name.replace(theirs, ours)
        return name

    def _add(self, name: str, packed: Packed, header: Header) -> None:
        logical = self._logical(name)
        if logical in self.packed:
            raise ValueError(f"{header.file}: {shortened(logical)} is there twice, in two formats")
        self.packed[logical] = packed
        self.headers[logical] = Header(header.file, packed.shape, "BF16", 0, 2 * math.prod(packed.shape))

    def _recognised(self, name: str, header: Header) -> tuple[str, Packed, str] | None:
        """The logical name of a packed weight, how it is read, and its module, if this tensor holds its codes."""
        stem, _, leaf = name.rpartition(".")
        stem, dtype = f"{stem}.", header.dtype
        if leaf in ("qweight", "weight_packed") or (leaf == "weight" and dtype in NARROW):
            module = Module(self._files.headers, self.listing, stem, name)
            packed = self._matrix(module, leaf, dtype)
            return (f"{stem}weight", packed, stem) if packed else None
        if leaf.endswith("_blocks") and dtype == "U8":
            stem = name.removesuffix("blocks")
            return stem[:-1], mxfp4_experts(Module(self._files.headers, self.listing, stem, name)), stem
        if dtype in FP8 and not leaf.endswith(("scale", "scale_inv")):
            stem = f"{name}_"
            module = Module(self._files.headers, self.listing, stem, name)
            return name, fp8_weight(module, self._said.blocks), stem
        return None

    def _matrix(self, module: Module, leaf: str, dtype: str) -> Packed | None:
        if leaf == "qweight":
            if self._said.method not in ("gptq", "awq"):
                raise module.wrong(module.codes, "may be of GPTQ or AWQ: config.json has no quantization_config of one")
            ((_, size),) = self._said.groups
            awq = self._said.method == "awq"
            return awq_weight(module, size) if awq else gptq_weight(module, size, self._said.less_one)
        if leaf == "weight_packed":
            if dtype == "I32":
                return packed_weight(module, self._said.groups, self._files.read)
            return fp4_weight(module)
        if dtype in FP8:
            return fp8_weight(module, self._said.blocks)
        there = [leaf for leaf in ("weight_scale", "scale") if leaf in module]
        if not there and not self._said.method:
            return None  # bytes that are no weight of ours
        if dtype == "I8" and there == ["weight_scale"] and module.dtype("weight_scale") in FLOATS:
            return bytes_weight(module)
        return fp4_weight(module)

    def _is_of_activations(self, name: str) -> bool:
        leaf = name.rpartition(".")[2]
        return bool(self._said.method) and (leaf in ACTIVATIONS or leaf.endswith(FUSED_ACTIVATIONS))

    def _check_alone(self, name: str, modules: dict[str, str], fused: tuple[str, ...]) -> None:
        """ValueError for a tensor that would change what a weight means."""
        stem, _, leaf = name.rpartition(".")
        codes = modules.get(f"{stem}.")
        if name.startswith(fused):
            codes = next(modules[stem] for stem in fused if name.startswith(stem))
        if codes and "bias" not in leaf:
            said = f"stands beside {shortened(codes)}, and what it means there is not known"
        elif leaf in STRAYS or leaf.endswith("_scale_inv"):
            said = "scales a weight that is not packed, or not there"
        else:
            return
        raise ValueError(f"{self._files.headers[name].file}: {shortened(name)} {said}")

    def __contains__(self, name: str) -> bool:
        return name in self.headers

    def read(self, name: str, part: slice | None = None) -> np.ndarray:
        """The tensor, or ``tensor[part]``, in bfloat16 if it is packed and else as in the file.

        Of a tensor of all experts only the bytes of those in ``part`` are read; a packed matrix is read as a whole.
        ValueError, which names file and tensor: it holds NaN or infinity, or is damaged.
        """
        packed = self.packed.get(name)
        if packed is None:
            return self._files.read(self._filed[name], part)
        fused = len(packed.shape) == 3
        arrays = []
        for stored in packed.parts:
            shape = self._files.headers[stored].shape
            cut = part if fused and shape[:1] == packed.shape[:1] else None
            arrays.append(self._files.read(stored, cut))
        try:
            with np.errstate(all="ignore"):
                value = packed.decode(*arrays).astype(ml_dtypes.bfloat16)
        except ValueError as error:
            raise ValueError(f"{self.headers[name].file}: {packed.parts[0]} {error}") from error
        if not is_finite(value, "BF16"):
            said = f"{name}, {packed.words}, holds NaN or infinity: see {', '.join(packed.parts)}"
            raise ValueError(f"{self.headers[name].file}: {said}")
        return value if fused or part is None else value[part]

    def release(self) -> None:
        """Unmap all files, so that the pages that were read count as memory no more."""
        self._files.release()

    def files(self) -> set[Path]:
        return {header.file for header in self._files.headers.values()}

    def nbytes(self) -> int:
        """Of the folder's tensors as they are stored."""
        return self._files.nbytes()

    def dtypes(self) -> dict[str, int]:
        """Tensors of each dtype, as they are stored."""
        return self._files.dtypes()

    def stored_bytes(self, name: str) -> int:
        """Of one tensor with its scales."""
        parts = self.packed[name].parts if name in self.packed else (self._filed[name],)
        return sum(self._files.headers[part].nbytes for part in parts)

    def words(self, name: str) -> str:
        """What one tensor is stored in, such as "FP8 in blocks of 128 x 128"."""
        dtype = self.headers[name].dtype
        return self.packed[name].words if name in self.packed else WORDS.get(dtype, dtype)
