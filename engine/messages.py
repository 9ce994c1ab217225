"""What travels between server and engine process: typed msgpack messages in length-prefixed frames, never pickle."""

import socket
import struct

import msgspec

from anybit.engine.config import EngineConfig
from anybit.engine.logs import LogSettings
from anybit.engine.types import EngineStats, GenerationRequest, ModelInfo, TokenEvent

FRAME_HEADER = struct.Struct("<I")


class Start(msgspec.Struct, frozen=True, tag=True):
    """First message to the engine."""

    config: EngineConfig
    logs: LogSettings = LogSettings()


class Generate(msgspec.Struct, frozen=True, tag=True):
    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class AbortAll(msgspec.Struct, frozen=True, tag=True):
    """End every sequence, as when a drain's time is up."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """First message from an engine that loaded its model."""

    model: ModelInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Last message of an engine that cannot go on; `message` is one sentence."""

    message: str


class Events(msgspec.Struct, frozen=True, tag=True):
    """What one step produced, for all its sequences."""

    events: list[TokenEvent]


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    stats: EngineStats


ToEngine = Start | Generate | Abort | AbortAll
FromEngine = Ready | Failed | Events | Heartbeat

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    body = _encoder.encode(message)
    return FRAME_HEADER.pack(len(body)) + body


def decode_from_engine(body: bytes) -> FromEngine:
    message: FromEngine = _from_engine.decode(body)
    return message


class EngineChannel:
    """The engine's blocking end of the connection."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, message: FromEngine) -> None:
        self._connection.sendall(encode_frame(message))

    def receive(self) -> ToEngine | None:
        """The next message, or None when the server is gone."""
        header = self._read(FRAME_HEADER.size)
        if header is None:
            return None
        body = self._read(FRAME_HEADER.unpack(header)[0])
        if body is None:
            return None
        message: ToEngine = _to_engine.decode(body)
        return message

    def _read(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            part = self._connection.recv(min(size - len(parts), 1 << 20))
            if not part:
                return None
            parts += part
        return bytes(parts)
