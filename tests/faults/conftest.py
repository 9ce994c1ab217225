from tests.endtoend.conftest import cache, tiny_checkpoint, tiny_source

__all__ = ["cache", "tiny_checkpoint", "tiny_source"]
