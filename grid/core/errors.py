"""Errors of the job layer. Each has a code for programs and one line for people; some say what to do (`hint`)."""


class GridError(Exception):
    """Base. `code` is stable, `str(error)` is one line, `hint` may be empty."""

    code = "failed"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RefusedError(GridError):
    """A message broke a rule of its protocol or names nothing its sender may touch; it changed nothing."""

    code = "refused"


class BlobLostError(GridError):
    """A blob can't be had now: no peer that answers holds it, or there is no room for it."""

    code = "blob_lost"


class FencedError(RefusedError):
    """The message belongs to an epoch that is over, or to a peer that does not lead it."""

    code = "fenced"


class NotLeadingError(GridError):
    """This peer does not lead the job's log (any more): what was proposed may become a fact, or not."""

    code = "not-leader"


class JobUnknownError(GridError):
    """No peer that answers knows the job."""

    code = "unknown_job"


class IllegalTransitionError(GridError):
    """A job or stage was asked to go where its state table has no way."""

    code = "illegal_transition"


def cause_of(error: BaseException) -> BaseException:
    """Return the first error inside the groups that nurseries made of it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def in_one_line(error: BaseException) -> str:
    """Return what people are told of an error: of ours and the system's their text, of unexpected ones the type too."""
    cause = cause_of(error)
    text = " ".join(str(cause).split())
    if isinstance(cause, OSError):
        return f"{cause.strerror}: {cause.filename}" if cause.strerror and cause.filename else cause.strerror or text
    is_ours = type(cause).__module__.startswith(("grid.", "dht."))
    return text if is_ours and text else f"{type(cause).__name__}: {text}" if text else type(cause).__name__
