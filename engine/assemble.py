"""Builds a running engine from its configuration: verify, load, size the cache, describe."""

import json
import logging
import time
from pathlib import Path

import torch

from anybit.engine.config import ConfigError, EngineConfig
from anybit.engine.core import EngineCore
from anybit.engine.decode_graphs import DecodeGraphs
from anybit.engine.device_memory import DeviceMemory
from anybit.engine.kv.cache import build_cache
from anybit.engine.kv.sealed_setup import set_up_sealed
from anybit.engine.machine import (
    describe_device,
    keep_freed_memory,
    physical_cores,
    resolve_device,
    return_freed_memory,
    use_threads,
)
from anybit.engine.models.decoder import build_decoder
from anybit.engine.models.registry import read_config
from anybit.engine.runner import Runner
from anybit.engine.scheduler import Scheduler, SchedulerConfig
from anybit.engine.types import KVFormatInfo, ModelInfo
from anybit.engine.weight_traffic import WeightTraffic
from anybit.engine.weights.accounting import (
    bytes_read,
    float_part_bytes,
    linear_entries,
    vocabulary_entries,
    width_info,
)
from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.loader import NestedLoader
from anybit.engine.weights.manifest import Manifest, manifest_sha256, verify_files
from anybit.engine.weights.selfcheck import check_loaded

logger = logging.getLogger("anybit.engine")


def assemble(config: EngineConfig) -> tuple[EngineCore, ModelInfo]:
    """Load the checkpoint and return a core that is ready to step. Raises the errors of `engine.errors`."""
    started = time.monotonic()
    config.check()
    keep_freed_memory()
    device = resolve_device(config.device)
    use_threads(config.threads or physical_cores(), device)
    directory = Path(config.checkpoint)
    reader = CheckpointReader(directory)
    manifest = reader.manifest
    verify_files(directory, manifest)
    model_config = read_config(directory)
    bit_widths = _served_widths(config, manifest)
    max_model_len = config.max_model_len or model_config.max_position_embeddings
    if max_model_len > model_config.max_position_embeddings:
        raise ConfigError(f"max_model_len {max_model_len} exceeds the model's {model_config.max_position_embeddings}.")

    dtype = _compute_dtype(config.compute_dtype, device)
    loader = NestedLoader(reader, bit_widths, config.lm_head_bits, device)
    is_fast = config.reproducible is False
    decoder = build_decoder(model_config, loader, max_model_len, dtype, device, is_fast)
    logger.info("Self-check: %s.", check_loaded(reader, loader.loaded, device))
    books, pool = build_cache(
        config,
        decoder,
        max_model_len,
        device,
        lambda specs: set_up_sealed(reader, decoder, config.default_bit_width, max_model_len, specs),
    )
    return_freed_memory()  # what the checks have used is more than a step does
    if decoder.native is not None and not decoder.native.can_read(pool):
        logger.warning(
            "What computes all layers in one call here does not read these KV formats, so every request of this server is "
            "computed layer by layer, which is slower; each step is counted as a fallback."
        )
    reproducible = device.type == "cpu" or (DecodeGraphs.can_serve(decoder, pool) and not is_fast)
    if config.reproducible and not reproducible:
        raise ConfigError(
            "This model has no reproducible kernels for this GPU and KV format; use --fast or --device cpu."
        )
    checkpoint_hash = manifest_sha256(directory)
    prefix_identity = checkpoint_hash if config.prefix_cache else None
    core = EngineCore(
        Runner(decoder, pool),
        Scheduler(
            books, SchedulerConfig(config.num_seqs(device.type), config.step_tokens(device.type), prefix_identity)
        ),
        max_model_len,
        WeightTraffic(
            {width: bytes_read(linear_entries(manifest), width) for width in bit_widths},
            {width: float_part_bytes(linear_entries(manifest), width) for width in bit_widths},
            head_bytes=bytes_read(vocabulary_entries(manifest)[-1:], config.lm_head_bits),
        ),
        DeviceMemory(device, sum(loader.resident_bytes.values())),
    )
    info = ModelInfo(
        name=config.model_name,
        checkpoint=config.checkpoint,
        checkpoint_hash=checkpoint_hash,
        method=manifest.method,
        source=manifest.source_name,
        widths=[width_info(manifest, width, config.lm_head_bits) for width in bit_widths],
        default_bit_width=config.default_bit_width,
        lm_head_bits=config.lm_head_bits,
        max_model_len=max_model_len,
        max_num_seqs=config.num_seqs(device.type),
        vocab_size=model_config.vocab_size,
        eos_token_ids=_eos_token_ids(directory),
        weights_bytes=dict(loader.resident_bytes),
        kv_formats=[
            KVFormatInfo(name, pages.spec.bytes_per_token, pages.capacity_tokens, sorted(pages.spec.layer_formats))
            for name, pages in books.formats.items()
        ],
        device=describe_device(device),
        compute_dtype=str(dtype).removeprefix("torch."),
        reproducible=reproducible,
        load_seconds=time.monotonic() - started,
    )
    logger.info(
        "Loaded %s in %.1f s: %.0f MiB of weights for widths %s, KV cache for %s.",
        info.name,
        info.load_seconds,
        sum(info.weights_bytes.values()) / 2**20,
        ", ".join(map(str, bit_widths)),
        " and ".join(
            f"{kv.capacity_tokens} tokens ({kv.name}, {kv.bytes_per_token:.0f} bytes a token)" for kv in info.kv_formats
        ),
    )
    return core, info


def _served_widths(config: EngineConfig, manifest: Manifest) -> tuple[int, ...]:
    wanted = tuple(sorted(config.bit_widths or manifest.bit_widths))
    absent = [
        width for width in (*wanted, config.default_bit_width, config.lm_head_bits) if width not in manifest.bit_widths
    ]
    if absent:
        made = ", ".join(map(str, manifest.bit_widths))
        raise ConfigError(f"The checkpoint was made for the widths {made}; {absent[0]} bits cannot be served from it.")
    return wanted


def _compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _eos_token_ids(directory: Path) -> list[int]:
    """From generation_config.json, else config.json; both hold one id or a list."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if path.is_file():
            ids = json.loads(path.read_text()).get("eos_token_id")
            if ids is not None:
                return [ids] if isinstance(ids, int) else [int(token_id) for token_id in ids]
    return []
