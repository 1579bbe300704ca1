"""What our engines share: each row is a script of its own, `work.py`, and what it prints is what it found."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.rivals import work
from benchmarks.rivals.engines.base import ALL, Engine, version

SCRIPT = Path(work.__file__)
MODULES = ("blake3", "cloudpickle", "cryptography", "kademlia", "msgspec", "nacl", "trio", "typer")
PACKAGES = ("peergrid", "trio", "msgspec", "cryptography", "blake3", "cloudpickle")
STDERR_SHOWN = 1500
"""Characters of a failed script's last words."""
FILE_SCRIPT = """
import grid
def increment(x): return x + 1
assert grid.submit(increment, 1).result() == 2
print("first", flush=True)
"""

OnEvent = Callable[[dict[str, Any]], None]


class Scripted(Engine):
    """`command` says how a script is run; the rest is the same under `grid submit` and `python job.py`."""

    modules = MODULES
    packages = PACKAGES
    rows: ClassVar[frozenset[str]] = ALL

    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    def stop(self) -> None:
        self.folder.cleanup()

    def command(self, options: list[str]) -> tuple[list[str], dict[str, str]]:
        """Words before the script, and its environment. Options are `grid submit`'s."""
        raise NotImplementedError

    def options(self, measure: str, params: dict[str, Any]) -> list[str]:
        """What a row's user would type."""
        return ["--with", f"numpy=={version('numpy')}"] if measure == "array" else []

    def script(self, measure: str, params: dict[str, Any], on_event: OnEvent | None = None) -> work.Values:
        """Run one measure to its end."""
        words, env = self.command(self.options(measure, params))
        given = json.dumps({"workers": self.workers, **params})
        errors = Path(self.folder.name) / "stderr"
        found: work.Values | None = None
        said = ""
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [*words, str(SCRIPT), measure, given],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env, cwd=self.folder.name,
            )  # fmt: skip
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    event = json.loads(line)
                    if event["event"] == "values":
                        found = event["values"]
                    elif event["event"] == "error":
                        said = event["message"]
                    elif event["event"] == "kill":
                        timer = threading.Timer(event["after_s"], self.kill_worker, (event["pid"],))
                        timer.daemon = True
                        timer.start()
                    elif on_event is not None:
                        on_event(event)
            status = process.wait()
        if found is None or status:
            raise RuntimeError(said or f"exit status {status}: {errors.read_text(errors='replace')[-STDERR_SHOWN:]}")
        return found

    def kill_worker(self, pid: int) -> None:
        """SIGKILL, from outside: a sandboxed script could not."""
        raise NotImplementedError

    def values(self, row: str, measure: str, params: dict[str, Any]) -> work.Values:
        special = getattr(self, f"grid_{measure}", None)
        self.ensure()
        if special is not None:
            found: work.Values = special(**params)
            return found
        return self.script(measure, params)

    def cold(self) -> tuple[list[str], dict[str, str]]:
        """The command whose first line is a first result."""
        path = Path(self.folder.name) / "job.py"
        path.write_text(FILE_SCRIPT)
        words, env = self.command([])
        return [*words, str(path)], env


def wait_until(look: Callable[[], bool], within_s: float, what: str) -> None:
    """Poll for a state. Raises TimeoutError."""
    deadline = time.monotonic() + within_s
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.02)
