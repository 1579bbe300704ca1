"""The process an engine lives in: one JSON request a line in, one JSON reply a line out.

    python -m benchmarks.rivals.host ENGINE WORKERS
    python -m benchmarks.rivals.host --cold ENGINE WORKERS     # prints "first" after its first result, and ends

A request is {"row", "measure", "params"}; a reply {"values"} or {"unsupported"} or {"error"}. What an engine prints on its
stdout goes to stderr. The end of stdin ends the engine and the process.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

from benchmarks.rivals import work
from benchmarks.rivals.engines import engine_class
from benchmarks.rivals.engines.base import Unsupported


def serve(name: str, workers: int) -> None:
    """Until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = engine_class(name)(workers)

    def reply(**fields: Any) -> None:
        print(json.dumps(fields), file=replies, flush=True)

    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply(values=engine.values(request["row"], request["measure"], request["params"]))
            except (Unsupported, NotImplementedError) as error:
                reply(unsupported=str(error))
            except Exception as error:
                traceback.print_exc()
                reply(error=f"{type(error).__name__}: {error}")
    finally:
        engine.close()


def cold(name: str, workers: int) -> None:
    """Start, one call, the word."""
    engine = engine_class(name)(workers)
    engine.ensure()
    work.first(engine)
    print("first", flush=True)
    engine.close()


if __name__ == "__main__":
    if sys.argv[1] == "--cold":
        cold(sys.argv[2], int(sys.argv[3]))
    else:
        serve(sys.argv[1], int(sys.argv[2]))
