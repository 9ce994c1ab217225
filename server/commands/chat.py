"""`anybit chat`: talk to a model in the terminal and change its width between two sentences."""

import asyncio
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from anybit.engine.config import DEFAULT_METHOD, EngineConfig
from anybit.engine.errors import AnyBitError
from anybit.engine.logs import LogSettings
from anybit.engine.precision import Precision
from anybit.engine.process_client import ProcessEngine
from anybit.engine.types import GenerationRequest, ModelInfo, SamplingParams
from anybit.engine.weights.resolve import resolve_model
from anybit.server.commands.options import (
    DeviceOption,
    GroupSizeOption,
    MethodOption,
    ModelArgument,
    SourceOption,
    ThreadsOption,
    parse_bit_widths,
    parse_group_size,
)
from anybit.server.commands.preparation import ensure_prepared

if TYPE_CHECKING:
    from anybit.server.chat_template import ChatTemplate
    from anybit.server.tokenizer import PromptTokenizer

_HELP = "Commands: /width 2|3|4|6|8 changes the bit-width, /new starts over, /quit (or Ctrl-D) ends."


def chat(
    model: ModelArgument = None,
    bit_width: Annotated[int, typer.Option(help="Bits to begin with.")] = 8,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    threads: ThreadsOption = 0,
    device: DeviceOption = "auto",
    method: MethodOption = DEFAULT_METHOD,
    group_size: GroupSizeOption = "auto",
    source: SourceOption = "wheel",
) -> None:
    """Chat with a model; `/width 3` switches in the middle of a conversation."""
    config = EngineConfig("", "", default_bit_width=bit_width, threads=threads, device=device, max_num_seqs=1)
    config.check()
    resolved = resolve_model(model, method, parse_group_size(group_size), parse_bit_widths("all"), source)
    ensure_prepared(resolved, method, group_size, parse_bit_widths("all"))
    config = replace(config, checkpoint=str(resolved.checkpoint), model_name=resolved.name)
    asyncio.run(_converse(config, temperature, max_tokens))


async def _converse(config: EngineConfig, temperature: float, max_tokens: int) -> None:
    from anybit.server.chat_template import load_chat_template  # noqa: PLC0415 - the text side, after a quick --help
    from anybit.server.tokenizer import load_tokenizer  # noqa: PLC0415

    console = Console(highlight=False)
    engine = ProcessEngine(config, logs=LogSettings("WARNING"))
    await engine.start()
    try:
        tokenizer = load_tokenizer(Path(config.checkpoint))
        template = load_chat_template(Path(config.checkpoint), tokenizer.special_tokens)
        with console.status("Loading the model"):
            info = await engine.wait_ready()
        console.print(f"[bold]{info.name}[/] at {config.default_bit_width} bits. {_HELP}")
        conversation = _Conversation(engine, info, tokenizer, template, temperature, max_tokens)
        await conversation.run(console)
    finally:
        await engine.close()


class _Conversation:
    """Messages so far and the width of the next answer."""

    def __init__(
        self,
        engine: ProcessEngine,
        info: ModelInfo,
        tokenizer: "PromptTokenizer",
        template: "ChatTemplate",
        temperature: float,
        max_tokens: int,
    ) -> None:
        self._engine = engine
        self._info = info
        self._tokenizer = tokenizer
        self._template = template
        self._temperature = temperature
        self._max_tokens = max_tokens
        self._bit_width = info.default_bit_width
        self._messages: list[dict[str, str]] = []

    async def run(self, console: Console) -> None:
        while True:
            try:
                text = await asyncio.to_thread(console.input, f"\n[bold]{self._bit_width} bits>[/] ")
            except (EOFError, KeyboardInterrupt):
                return
            match text.split():
                case []:
                    continue
                case ["/quit"]:
                    return
                case ["/new"]:
                    self._messages.clear()
                case ["/width", width] if width in map(str, self._info.bit_widths):
                    self._bit_width = int(width)
                case [word, *_] if word.startswith("/"):
                    console.print(_HELP)
                case _:
                    await self._answer(text, console)

    async def _answer(self, text: str, console: Console) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        try:
            prompt = self._template.render(messages)
            room = self._info.max_model_len - 1
            ids = await self._tokenizer.encode(prompt, add_special_tokens=False, max_tokens=room, param="messages")
            if len(ids) > room:
                console.print("The conversation no longer fits the context; begin anew with /new.")
                return
            shown = await self._stream(ids, console)
        except AnyBitError as error:
            console.print(str(error))
            return
        self._messages = [*messages, {"role": "assistant", "content": shown}]

    async def _stream(self, prompt_token_ids: list[int], console: Console) -> str:
        from anybit.server.detokenizer import Detokenizer  # noqa: PLC0415 - the text side, after a quick --help

        sampling = SamplingParams(
            max_tokens=min(self._max_tokens, self._info.max_model_len - len(prompt_token_ids)),
            temperature=self._temperature,
            seed=uuid.uuid4().int & 0xFFFFFFFF,
            stop_token_ids=tuple(self._info.eos_token_ids),
        )
        request = GenerationRequest(uuid.uuid4().hex, prompt_token_ids, sampling, Precision(self._bit_width))
        detokenizer = Detokenizer(self._tokenizer.decoder(prompt_token_ids), ())
        shown = ""
        async for event in self._engine.generate(request):
            piece = detokenizer.push(event.token_ids)
            if event.finish_reason is not None:
                piece += detokenizer.finish()
            shown += piece
            console.out(piece, end="", highlight=False)
            if event.error:
                raise AnyBitError(event.error)
        console.print()
        return shown
