"""A GGUF file with the same weights in another format: what a quantized file holds, written as F16 or Q8_0.

Every matrix is decoded to fp32 and encoded anew; vectors stay fp32 and the metadata is copied, the tokenizer with it.
So a peer serves the weights that we serve, as exactly as its format can hold them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, ReaderField
from gguf.quants import dequantize, quantize

FORMATS = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
# The writer makes these itself, or they describe the old file.
_OWN = ("general.architecture", "general.file_type", "general.quantization_version")
QUANTIZATION_VERSION = 2


def rewrite(source: Path, target: Path, format: str) -> Path:
    """Write `source` anew at `target` in one of FORMATS; nothing is left there when it fails."""
    kind, file_type = FORMATS[format]
    reader = GGUFReader(source)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    writer = GGUFWriter(partial, _architecture(reader))
    try:
        for field in reader.fields.values():
            _copy_field(field, writer)
        writer.add_file_type(file_type)
        writer.add_quantization_version(QUANTIZATION_VERSION)
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if values.ndim < 2:
                writer.add_tensor(tensor.name, values)
            else:
                writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(target)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)
    return target


def _architecture(reader: GGUFReader) -> str:
    return str(reader.fields["general.architecture"].contents())


def _copy_field(field: ReaderField, writer: GGUFWriter) -> None:
    if field.name.startswith("GGUF.") or field.name in _OWN:
        return
    kind = field.types[0]
    inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
