"""What can go wrong for a job's author, as exceptions. The user's own exceptions reach the caller as themselves."""

from __future__ import annotations


class GridError(Exception):
    """The grid could not do what was asked: it is gone, a file is not there, an option makes no sense."""


class TaskError(GridError):
    """A task failed, and its own exception could not travel: the message names its type. Its cause is the traceback."""


class WorkerDied(TaskError):
    """The process that ran the task ended before the task did: it was killed, crashed, or called os._exit."""


class TaskTimeout(TaskError, TimeoutError):
    """The task ran longer than its `task_timeout`."""


class MemoryExceeded(TaskError, MemoryError):
    """The task used more memory than it may."""


class UnpicklableResult(TaskError, TypeError):
    """The task returned something that can't be sent."""


class RemoteTraceback(Exception):
    """The traceback of a task as text: the `__cause__` of the exception that reached the caller."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text.rstrip()}\n"""'


BY_KIND: dict[str, type[TaskError]] = {
    "died": WorkerDied,
    "timeout": TaskTimeout,
    "memory": MemoryExceeded,
    "unpicklable": UnpicklableResult,
}
"""wire.Failure.kind → the exception for a failure that brought none of its own."""
