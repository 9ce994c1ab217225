"""How an engine is set up; checked once, when the engine starts."""

from dataclasses import dataclass

from anybit.engine.errors import AnyBitError

_NUM_SEQS = {"cpu": 16, "cuda": 128}
# On a GPU a prompt's weights are unpacked once a step, which few tokens would not pay for.
_STEP_TOKENS = {"cpu": 256, "cuda": 2048}
DEVICES = ("auto", "cpu", "cuda")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
AUTO_KV_FORMAT = "auto"
"""What suits the model and the device (`engine.kv.default_format`)."""
EXACT_KV_FORMATS = frozenset(("bf16", "float32"))
KV_FORMATS = (
    *("bf16", "float32"),
    *("qet4", "qet3", "qet2", "qet2+2", "qet2+2@2"),
    *("uniform8", "uniform4", "uniform3", "uniform2"),
)
BIT_WIDTHS = (2, 3, 4, 6, 8)
DEFAULT_METHOD = "best"
"""How a model is quantized when nobody says how."""
QUICK_METHOD = "rtn"
"""What serves while a slower method is at work."""


class ConfigError(AnyBitError):
    """A setting is out of range or two settings contradict each other."""


def check_kv_format(name: str) -> None:
    """ConfigError unless `name` is one of KV_FORMATS, or two that go together ("qet4/qet3": keys, then values)."""
    parts = name.split("/", 1)
    for part in parts:
        if part not in KV_FORMATS:
            raise ConfigError(f"The KV format {part!r} is not one of {', '.join(KV_FORMATS)}.")
    if len(parts) > 1 and parts[0] != parts[1] and not EXACT_KV_FORMATS.isdisjoint(parts):
        raise ConfigError(
            f"The KV format {name} mixes an exact format with another; exact ones are for keys and values."
        )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one engine process.

    `bit_widths` empty means every width of the checkpoint. `max_model_len` 0 means what the model was trained for.
    `kv_format` is that of requests that name none: one of KV_FORMATS, two ("qet4/qet3": keys, then values), or what suits
    model and device (AUTO_KV_FORMAT); `kv_formats` are others on offer. `max_num_seqs` sequences are computed together; 0
    means what suits the device. `kv_cache_bytes` 0 means enough for as many full contexts, but at most a quarter of the free
    memory (on a GPU most of it). `prefix_cache` keeps the pages of ended sequences for later ones with the same beginning.
    `threads` 0 means the physical cores. `max_step_tokens` bounds how many tokens one step computes, so that a long
    prompt delays running sequences by no more than that; 0 means what suits the device. `reproducible` asks for
    results that do not depend on the batch (None: wherever that is possible).
    """

    checkpoint: str
    model_name: str
    bit_widths: tuple[int, ...] = ()
    default_bit_width: int = 4
    lm_head_bits: int = 8
    kv_format: str = AUTO_KV_FORMAT
    kv_formats: tuple[str, ...] = ()
    compute_dtype: str = "auto"
    device: str = "auto"
    threads: int = 0
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_step_tokens: int = 0
    kv_cache_bytes: int = 0
    prefix_cache: bool = True
    reproducible: bool | None = None

    def num_seqs(self, device_type: str) -> int:
        """Most sequences of one step on a device ("cpu", "cuda")."""
        return self.max_num_seqs or _NUM_SEQS[device_type]

    def step_tokens(self, device_type: str) -> int:
        """Most tokens of one step on a device ("cpu", "cuda")."""
        return self.max_step_tokens or _STEP_TOKENS[device_type]

    def check(self) -> None:
        """Raise ConfigError, with the one sentence a user needs, unless every setting is usable."""
        for width in (*self.bit_widths, self.default_bit_width, self.lm_head_bits):
            if width not in BIT_WIDTHS:
                raise ConfigError(f"Bit-width {width} is not one of {', '.join(map(str, BIT_WIDTHS))}.")
        if self.bit_widths and self.default_bit_width not in self.bit_widths:
            widths = ", ".join(map(str, self.bit_widths))
            raise ConfigError(
                f"The default bit-width {self.default_bit_width} is not among the served widths {widths}."
            )
        for served in (*((self.kv_format,) if self.kv_format != AUTO_KV_FORMAT else ()), *self.kv_formats):
            check_kv_format(served)
        for name, value, choices in (
            ("device", self.device, DEVICES),
            ("compute dtype", self.compute_dtype, COMPUTE_DTYPES),
        ):
            if value not in choices:
                raise ConfigError(f"The {name} {value!r} is not one of {', '.join(choices)}.")
        for name, number, least in (
            ("threads", self.threads, 0),
            ("max_model_len", self.max_model_len, 0),
            ("max_num_seqs", self.max_num_seqs, 0),
            ("max_step_tokens", self.max_step_tokens, 0),
            ("kv_cache_bytes", self.kv_cache_bytes, 0),
        ):
            if number < least:
                raise ConfigError(f"{name} is {number} but must be at least {least}.")
