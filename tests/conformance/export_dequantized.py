"""Writes what one width of a checkpoint means as an ordinary float32 Hugging Face model, for judges that know nothing else.

Runs where AnyBit is installed: python tests/conformance/export_dequantized.py CHECKPOINT DESTINATION BIT_WIDTH
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from anybit.engine.weights.checkpoint import CheckpointReader
from anybit.engine.weights.huggingface_source import TOKENIZER_FILES
from anybit.kernels import reference

LM_HEAD_BITS = 8  # of embedding and head, as `anybit serve` has it by default


def main() -> None:
    checkpoint, destination, bit_width = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    destination.mkdir(parents=True, exist_ok=True)
    reader = CheckpointReader(checkpoint)
    tensors = {}
    for name in reader.manifest.tensors:
        width = LM_HEAD_BITS if "embed_tokens" in name or "lm_head" in name else bit_width
        weight = reader.allocate([name], (width,))
        reader.copy_nested(name, weight)
        tensors[name] = reference.dequantize(weight, width).float().contiguous()
    for shard in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(shard).items():
            if not any(name.startswith(f"{nested}.") for nested in reader.manifest.tensors):
                tensors[name] = tensor.float()
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config.pop("quantization_config", None)
    config |= {"dtype": "float32", "torch_dtype": "float32"}
    (destination / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER_FILES:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, destination / name)


if __name__ == "__main__":
    main()
