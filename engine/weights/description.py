"""A checkpoint described for people and scripts."""

from pathlib import Path
from typing import Any

import msgspec

from anybit.engine.weights.accounting import bytes_resident, linear_entries, vocabulary_entries, width_info
from anybit.engine.weights.manifest import manifest_sha256, read_manifest, verify_files


def describe_checkpoint(directory: Path, lm_head_bits: int = 8) -> dict[str, Any]:
    """What `anybit inspect` shows; CheckpointError if the checkpoint is damaged."""
    manifest = read_manifest(directory)
    verify_files(directory, manifest)
    resident = bytes_resident(linear_entries(manifest), manifest.bit_widths)
    resident += bytes_resident(vocabulary_entries(manifest), (lm_head_bits,))
    return {
        "checkpoint": str(directory),
        "sha256": manifest_sha256(directory),
        "source": manifest.source_name,
        "source_sha256": manifest.source_sha256,
        "method": manifest.method,
        "group_size": manifest.group_size,
        "decoder": manifest.decoder,
        "num_tensors": len(manifest.tensors),
        "num_files": len(manifest.files) + 1,
        "file_bytes": sum(path.stat().st_size for path in directory.iterdir()),
        "resident_bytes": resident,
        "lm_head_bits": lm_head_bits,
        "key_balance": msgspec.to_builtins(manifest.key_balance),
        "perplexity_text": manifest.perplexity_text,
        "widths": [msgspec.to_builtins(width_info(manifest, width, lm_head_bits)) for width in manifest.bit_widths],
    }
