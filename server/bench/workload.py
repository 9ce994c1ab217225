"""Which prompts a measurement sends, and when: all of it follows from the seed."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anybit.engine.errors import AnyBitError

# Common words, because most vocabularies hold each of them as one token.
_WORD_LIST = """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea kid body information back parent face
others level office door health person art war history party result change morning reason research girl guy moment air
teacher force education foot boy age policy music market sense nation plan college interest death experience effect use
class control field development role effort rate heart drug show leader light voice wife police mind price report
decision son view relationship town road arm difference value building action season society tax director position
player record paper space ground form event official matter center couple site project activity star table need court
oil situation cost industry figure street image phone data picture practice piece land product doctor wall patient
worker news test movie north love third river green small large early young important public bad same able
"""
_WORDS = _WORD_LIST.split()


class WorkloadError(AnyBitError):
    """The prompts to send cannot be had."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts by index, each about `prompt_tokens` long and the same for the same seed.

    Random prompts of different indexes share nothing but their first `shared_prefix_tokens`, so that a server's prefix
    cache helps with those and with nothing else. `lines` replace them; more indexes than lines begin anew.
    """

    seed: int = 0
    prompt_tokens: int = 256
    shared_prefix_tokens: int = 0
    lines: Sequence[str] = ()

    def prompt(self, index: int) -> str:
        if self.lines:
            return self.lines[index % len(self.lines)]
        shared = _words(f"{self.seed}/shared", self.shared_prefix_tokens)
        own = _words(f"{self.seed}/{index}", self.prompt_tokens - self.shared_prefix_tokens)
        return " ".join([*shared, *own])

    def prompts(self, first: int, count: int) -> list[str]:
        return [self.prompt(index) for index in range(first, first + count)]


def _words(seed: str, count: int) -> list[str]:
    return random.Random(seed).choices(_WORDS, k=count)


def arrival_seconds(rate: float, count: int, seed: str) -> list[float]:
    """When each request is sent, in seconds after the first: a Poisson process of `rate` a second, or all at once."""
    if math.isinf(rate):
        return [0.0] * count
    generator = random.Random(seed)
    arrivals = [0.0]
    while len(arrivals) < count:
        arrivals.append(arrivals[-1] + generator.expovariate(rate))
    return arrivals


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that hold something. Raises WorkloadError when there are none or it cannot be read."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise WorkloadError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path} is not UTF-8 text.") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise WorkloadError(f"{path} holds no prompt; write one on each line.")
    return prompts
