"""Recommendations over HTTP: a front that reads requests and batches them, and worker processes that hold the model.

The front is Starlette on uvicorn, in the main process. A worker is a process of its own, so that one that dies, hangs
or goes with its model takes nothing else with it. What a batch is, and which options go together, is this package's;
HTTP, signals and metrics are those packages', which `pip install onerec_hf[serve]` brings.
"""

try:
    from .app import Server, ServerOptions, serve
except ModuleNotFoundError as error:
    if error.name not in ("starlette", "uvicorn", "prometheus_client"):
        raise
    raise ModuleNotFoundError(
        f"The server needs {error.name}: pip install -c constraints.txt 'onerec_hf[serve]'.", name=error.name
    ) from None
from .requests import Limits
from .worker_pool import LoadError
