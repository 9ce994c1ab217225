"""Makes the checkpoint that a resolved model needs: fetch, quantize, measure, publish, all or nothing."""

from collections.abc import Callable
from pathlib import Path

import msgspec

from anybit.engine.errors import SourceError
from anybit.engine.evaluate.report import quick_perplexity
from anybit.engine.kv.key_balance import FILE_NAME
from anybit.engine.machine import resolve_device
from anybit.engine.quantize.kv_calibration import calibrate_keys
from anybit.engine.quantize.options import QuantizeOptions
from anybit.engine.quantize.run import quantize
from anybit.engine.weights.cache import building, require_free_space
from anybit.engine.weights.download import demo_gguf, hub_snapshot
from anybit.engine.weights.manifest import Manifest, file_sha256, write_manifest
from anybit.engine.weights.open_source import open_source
from anybit.engine.weights.progress_file import clear_progress, report_progress
from anybit.engine.weights.resolve import is_repository
from anybit.engine.weights.selfcheck import check_checkpoint
from anybit.engine.weights.source import SourceModel

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a stage is one of "download", "quantize", "keys", "measure"."""


def fetch_source(source: str, progress: Progress = lambda *_: None) -> SourceModel:
    """Open "demo", a local path, or a hub repository, downloading what is not here."""
    if source == "demo":
        return open_source(demo_gguf(lambda done, total: progress("download", done, total)))
    path = Path(source)
    return open_source(hub_snapshot(source) if not path.exists() and is_repository(source) else path)


def prepare_checkpoint(
    source: str, destination: Path, options: QuantizeOptions, progress: Progress = lambda *_: None
) -> Manifest:
    """Quantize `source` into `destination`, which appears complete or not at all. Raises the errors of `engine.errors`.

    How far it is can be read beside the destination all the while (`weights.progress_file`).
    """
    _require_vacant(destination)

    def report(stage: str, done: int, total: int) -> None:
        report_progress(destination, stage, done, total)
        progress(stage, done, total)

    try:
        return _prepare(source, destination, options, report)
    finally:
        clear_progress(destination)


def _prepare(source: str, destination: Path, options: QuantizeOptions, progress: Progress) -> Manifest:
    model = fetch_source(source, progress)
    # Beside the checkpoint a calibrated method keeps what it has solved until it is done.
    require_free_space(destination, (4 if options.is_calibrated else 2) * _source_bytes(model))
    with building(destination) as partial:
        _require_vacant(destination)  # still, if another process was building until now
        manifest = quantize(
            model, partial, options, lambda done, total, _: progress("quantize", done, total), work_beside=destination
        )
        device = resolve_device(options.device)
        check_checkpoint(partial, device)
        if options.kv_calibration:
            entry = calibrate_keys(
                partial, options.kv_calibration, options.seed, device, lambda done, total: progress("keys", done, total)
            )
            files = {**manifest.files, FILE_NAME: file_sha256(partial / FILE_NAME)}
            manifest = msgspec.structs.replace(manifest, key_balance=entry, files=files)
        perplexity, text = quick_perplexity(partial, model, lambda done, total: progress("measure", done, total))
        manifest = msgspec.structs.replace(manifest, perplexity=perplexity, perplexity_text=text)
        write_manifest(partial, manifest)
    return manifest


def _require_vacant(destination: Path) -> None:
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise SourceError(f"{destination} already exists; choose another destination or remove it.")


def _source_bytes(model: SourceModel) -> int:
    path = Path(model.location)
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix == ".safetensors"]
    return sum(file.stat().st_size for file in files)
