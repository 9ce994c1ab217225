"""The native HTTP server of the package `xllamacpp` (llama.cpp, prebuilt), until standard input ends.

Started by `llama_cpp_peer.py` with the interpreter that has the package; needs nothing else, AnyBit neither. One line on
standard output says what runs, as JSON; whatever llama.cpp itself writes goes to standard error.
"""

import argparse
import json
import os
import platform
import sys

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--stream-tokens", type=int, default=768, help="context of each stream")
    options = parser.parse_args()
    with os.fdopen(os.dup(1), "w") as announcements:
        os.dup2(2, 1)
        params = xllamacpp.CommonParams()
        params.model.path = options.model
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
        params.n_parallel, params.n_ctx = options.streams, options.streams * options.stream_tokens
        params.port, params.verbosity = 0, 0  # a free port of 127.0.0.1, nothing logged
        params.cache_ram_mib = 0  # prompts never repeat here: spared the copies that it would keep of them
        server = xllamacpp.Server(params)
        about = {
            "xllamacpp": xllamacpp.__version__,
            "python": platform.python_version(),
            "build": xllamacpp.BUILD_INFO,
            "system_info": xllamacpp.get_system_info().strip(),
            "address": server.listening_address,
        }
        announcements.write(json.dumps(about) + "\n")
    sys.stdin.read()
    os._exit(0)  # the native threads have nothing to save


if __name__ == "__main__":
    main()
