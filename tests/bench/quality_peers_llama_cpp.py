"""The quality of llama.cpp's formats, made by its own quantizer (the package `llama-cpp-python`).

    pip install llama-cpp-python
    python tests/bench/quality_peers_llama_cpp.py --text FILE --calibration FILE --variant rotated --json OUT

Every format is made as it is and, with --calibration, with an importance matrix from that text. Embedding and head are
Q8_0 throughout. Effective bits are the file's own, over the linears, and `formats` says which each kind of them got: rows
that are no multiple of 256 do not fit most formats. With --joined they are made to (see quality_peers_gguf.py).
"""

import argparse
import ctypes
import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import llama_cpp
import numpy as np
from numpy.typing import NDArray
from quality_peers_gguf import GGUFTemplate, importance_of_file, read_quantized, write_gguf
from quality_peers_importance import input_importance, spread_windows
from quality_peers_score import Candidate, add_options, encode, open_variant, prepare, score
from quality_sources import ReplacedSource
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from anybit.engine.weights.source import SourceModel

FORMATS = (
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_S", "Q3_K_M"),
    *("IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S"),
)
_CALIBRATION_CONTEXT = 512  # that of llama.cpp's own tool
_CALIBRATION_SHARE = 0.9  # of the text's characters; the rest is for choosing settings

Importance = Mapping[str, NDArray[np.float32]]


class QuantizerRefusedError(Exception):
    """What llama.cpp said when it did not make a file."""


_said: list[str] = []


def _hear(_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
    _said.append(text.decode(errors="replace"))


_ear = llama_cpp.llama_log_callback(_hear)
"""Kept here, since llama.cpp calls it for as long as the process lives."""


def quantize_gguf(source: Path, destination: Path, name: str, importance: Importance | None, threads: int) -> float:
    """Make a file of the format called `name`; the seconds it took. QuantizerRefusedError if llama.cpp would not."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.output_tensor_type = params.token_embedding_type = llama_cpp.GGML_TYPE_Q8_0
    entries = None
    if importance is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()  # the last one's empty name ends it
        for entry, (tensor, columns) in zip(entries, importance.items(), strict=False):
            entry.name = tensor.encode()
            entry.data = columns.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entry.size = columns.size
        params.imatrix = entries
    _said.clear()
    started = time.perf_counter()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(params)):
        raise QuantizerRefusedError(_said[-1].strip() if _said else "llama.cpp gave no reason")
    return time.perf_counter() - started


def candidates(
    source: SourceModel, template: GGUFTemplate, importance: Importance | None, options: argparse.Namespace
) -> Iterator[Candidate]:
    """One per format; those that are refused are named on standard output."""
    method = "llama.cpp" + (", joined rows" if options.joined else "") + (", imatrix" if importance else "")
    with tempfile.TemporaryDirectory() as directory:
        floats = Path(directory) / "float.gguf"
        write_gguf(template, source, floats, options.joined)
        for name in options.formats.split(","):
            path = Path(directory) / f"{name}.gguf"
            try:
                seconds = quantize_gguf(floats, path, name, importance, options.threads)
            except QuantizerRefusedError as error:
                print(f"{method}, {name}: not made: {error}", flush=True)
                continue
            made = read_quantized(path, template, source)
            path.unlink()
            yield Candidate(
                method=method,
                variant=options.variant,
                bit_width=name,
                effective_bits=made.linear_bits,
                minutes=seconds / 60,
                source=ReplacedSource(source, made.linears | made.vocabulary),
                more={"with_embedding_and_head": round(made.all_bits, 4), "formats": made.formats},
            )


def all_candidates(options: argparse.Namespace) -> Iterator[Candidate]:
    source = open_variant(options)
    template = GGUFTemplate.open(Path(source.location))
    if options.plain:
        yield from candidates(source, template, None, options)
    if options.calibration is not None:
        importance = importance_of_file(calibrated_importance(source, options), template, options.joined)
        yield from candidates(source, template, importance, options)


def calibrated_importance(source: SourceModel, options: argparse.Namespace) -> dict[str, Tensor]:
    """Computed from the calibration text, or read from the file where an earlier run kept it for the same weights."""
    token_ids = encode(source, options.calibration, _CALIBRATION_SHARE)
    token_windows = spread_windows(token_ids, _CALIBRATION_CONTEXT, options.calibration_windows)
    if options.importance is None:
        return input_importance(source, token_windows)
    made_from = {"weights": source.sha256(), "tokens": hashlib.sha256(str(token_windows).encode()).hexdigest()}
    if options.importance.is_file():
        with safe_open(options.importance, "pt") as file:
            if file.metadata() == made_from:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    importance = input_importance(source, token_windows)
    save_file({name: columns.clone() for name, columns in importance.items()}, options.importance, metadata=made_from)
    return importance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--joined", action="store_true", help="rows joined so that blocks of 256 fit")
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True, help="also without importance")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text to compute importance from")
    parser.add_argument("--calibration-windows", type=int, default=64, help=f"of {_CALIBRATION_CONTEXT} tokens")
    parser.add_argument("--importance", type=Path, help="safetensors file that keeps it for the next run")
    options = parser.parse_args()
    prepare(options)
    llama_cpp.llama_log_set(_ear, None)
    score(all_candidates(options), options, {"llama-cpp-python": llama_cpp.__version__})


if __name__ == "__main__":
    main()
