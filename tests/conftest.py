"""For all tests: what a shell does to background jobs must not change what they test."""

from __future__ import annotations

import signal

# A shell without job control starts background jobs with SIGINT ignored, and that is inherited: tests of Ctrl-C would hang.
signal.signal(signal.SIGINT, signal.default_int_handler)
