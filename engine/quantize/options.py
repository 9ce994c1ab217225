"""What a quantization is asked to do; imports no torch, so that commands can check it before they load anything."""

from dataclasses import dataclass

from anybit.engine.config import BIT_WIDTHS

METHODS = ("rtn", "gptq", "gptq-sliced", "decoupleq", "decoupleq-projected", "best")
"""`gptq` chooses codes for all widths together, `gptq-sliced` for the widest alone; with one width both are GPTQ.

`decoupleq-projected` searches the codes' box by projected gradients before it rounds.
"""
SHIPPED = "shipped"
"""Names the calibration text that comes with the package."""


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """`group_size` None chooses per weight the largest of 128, 64, 32 that divides its input; `per_channel` gives all
    of a row one scale and zero. `calibration` names UTF-8 files or "shipped"; each gives as many windows. What is None is
    chosen by the method: `sequences` of `context` tokens, the damping of Hessians relative to their mean diagonal, and
    whether the linears of a block see what those before them in the block have become (`true_sequential`).
    `stages` 1 leaves out all training. From the texts `kv_calibration`, named likewise, the balance weights of keys are
    estimated that compressed KV formats use; without any, servers estimate them at their start."""

    method: str = "rtn"
    bit_widths: tuple[int, ...] = BIT_WIDTHS
    group_size: int | None = None
    per_channel: bool = False
    calibration: tuple[str, ...] = (SHIPPED,)
    kv_calibration: tuple[str, ...] = ()
    sequences: int | None = None
    context: int | None = None
    damping: float | None = None
    true_sequential: bool = False
    stages: int = 2
    seed: int = 0
    device: str = "auto"

    @property
    def group_size_label(self) -> str:
        return "auto" if self.group_size is None else str(self.group_size)

    @property
    def is_calibrated(self) -> bool:
        return self.method != "rtn"
