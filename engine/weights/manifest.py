"""anybit.json: what a checkpoint holds, how it was made, and the hashes that prove it (FORMATS, section 3)."""

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from anybit.engine.config import BIT_WIDTHS
from anybit.engine.errors import CheckpointError

MANIFEST_NAME = "anybit.json"
FORMAT_VERSION = 1
DECODERS = ("affine",)
FLOAT_DTYPE_NAMES = ("float16", "float32")


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One quantized weight: [out, in], its group size, and the dtype of its float parts."""

    shape: tuple[int, int]
    group_size: int
    float_dtype: str


class KeyBalanceEntry(msgspec.Struct, frozen=True):
    """What the balance weights of the keys come from: SHA-256 of each text by its file's name, tokens of all."""

    texts: dict[str, str]
    tokens: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a reader must know before it opens a shard.

    `tensors` names the nested weights; what else the shards hold (norms, biases) is float. `perplexity` maps a
    bit-width or "float" to what was measured on `perplexity_text` when the checkpoint was made. `files` maps every
    other file of the directory to its SHA-256. With `key_balance` there is a file of balance weights
    (`engine.kv.key_balance`).
    """

    format_version: int = FORMAT_VERSION
    method: str
    method_options: dict[str, Any]
    decoder: str = "affine"
    bit_widths: tuple[int, ...]
    group_size: str
    tensors: dict[str, TensorEntry]
    source_name: str
    source_location: str
    source_sha256: str
    calibration: dict[str, Any] | None = None
    key_balance: KeyBalanceEntry | None = None
    perplexity: dict[str, float] = {}
    perplexity_text: str = ""
    files: dict[str, str] = {}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    (directory / MANIFEST_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def read_manifest(directory: Path) -> Manifest:
    """Parse and check anybit.json; CheckpointError if it is absent, malformed, or of a version this code cannot read."""
    path = directory / MANIFEST_NAME
    try:
        raw = path.read_bytes()
        version = msgspec.json.decode(raw, type=dict[str, Any]).get("format_version")
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{directory} is not an AnyBit checkpoint: {MANIFEST_NAME} cannot be read.") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{directory} has format version {version}, but this AnyBit reads version {FORMAT_VERSION}; quantize it again."
        )
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if manifest.decoder not in DECODERS:
        raise CheckpointError(f"{directory} uses the decoder {manifest.decoder!r}, which this AnyBit does not know.")
    if not manifest.bit_widths or any(width not in BIT_WIDTHS for width in manifest.bit_widths):
        raise CheckpointError(f"{path} names bit-widths that do not exist: {list(manifest.bit_widths)}.")
    for name, entry in manifest.tensors.items():
        _check_entry(path, name, entry)
    return manifest


def _check_entry(path: Path, name: str, entry: TensorEntry) -> None:
    out_features, in_features = entry.shape
    grouped = entry.group_size > 0 and in_features % entry.group_size == 0 and in_features % 32 == 0
    if out_features < 1 or in_features < 1 or not grouped or entry.float_dtype not in FLOAT_DTYPE_NAMES:
        raise CheckpointError(f"{path} describes the weight {name} in a way that makes no sense; quantize it again.")


def manifest_sha256(directory: Path) -> str:
    """The checkpoint's identity: the manifest names the hash of every other file."""
    return hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Compare every file with its recorded hash; CheckpointError names the first that is missing or altered."""
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"The checkpoint {directory} lacks its file {name}.")
        if file_sha256(path) != expected:
            raise CheckpointError(f"The file {path} does not match its recorded SHA-256: it is damaged or was altered.")
