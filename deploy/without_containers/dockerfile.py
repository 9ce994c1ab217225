"""Reads a Dockerfile, as far as this project's one goes."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Instruction:
    """`name` in capitals; `options` are those like --from=build; `text` is the rest of the line, continued lines joined."""

    name: str
    options: dict[str, str]
    text: str

    @property
    def words(self) -> list[str]:
        """A JSON array, or words as a shell would split them."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


@dataclass(slots=True)
class Stage:
    name: str
    base: str  # an image, or the name of an earlier stage
    instructions: list[Instruction] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Dockerfile:
    arguments: dict[str, str]  # before the first stage
    stages: dict[str, Stage]

    def lineage(self, target: str) -> list[Stage]:
        """The stages whose instructions make `target`, from its image on; raises KeyError for an unknown target."""
        stage = self.stages[target]
        return [*(self.lineage(stage.base) if stage.base in self.stages else ()), stage]


def read_dockerfile(path: Path) -> Dockerfile:
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for instruction in _instructions(path.read_text()):
        if instruction.name == "FROM":
            base, _, name = instruction.text.partition(" AS ")
            stage = stages[name.strip() or str(len(stages))] = Stage(name.strip(), base.strip())
        elif stage is not None:
            stage.instructions.append(instruction)
        elif instruction.name == "ARG":
            name, _, value = instruction.text.partition("=")
            arguments[name] = value
        else:
            raise ValueError(f"{instruction.name} stands before the first FROM.")
    return Dockerfile(arguments, stages)


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in joined.splitlines():
        name, _, rest = line.strip().partition(" ")
        options: dict[str, str] = {}
        rest = rest.strip()
        while (match := re.match(r"--([a-z-]+)=(\S+)\s+", rest)) is not None:
            options[match[1]] = match[2]
            rest = rest[match.end() :]
        found.append(Instruction(name.upper(), options, rest.strip()))
    return found
