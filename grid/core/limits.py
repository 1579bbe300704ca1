"""Every bound of the job layer, with its reason. Units stand last in the names.

Rule: a queue, table, message or retry that another peer, a user's script or a long run can grow has its bound here.
"""

from typing import Final

# ---- time ------------------------------------------------------------------------------------------------------------

HEARTBEAT_S: Final = 0.5
"""Claims are sent this often by a peer that holds ranges: a lost peer's work restarts after two of them."""
CLAIM_MISSED_MAX: Final = 2
"""Heartbeats for which a range may go unclaimed before it is requeued: one may be in flight while it moves."""
LEASE_S: Final = 3.0
"""A peer whose claims are older than this holds nothing any more, whether its connection stands or not (a stopped process)."""
CLAIMANTS_MAX: Final = 32
"""Helpers of a job whose heartbeats its leader takes each HEARTBEAT_S. With twice as many each sends half as often, so that a
leader's load does not grow with them; leases grow alike, connections that break are noticed at once all the same."""
LEASE_HEARTBEATS: Final = 6
"""Heartbeats in LEASE_S, at whatever interval they come."""
GRAIN_S: Final = 0.05
"""Work in one bundle for a worker: long enough that its messages don't count, short enough that little is lost or waits."""
STEAL_LOW_WATER_S: Final = 0.25
"""A thief asks again when its own deque holds less work than this: a steal's round trip is then hidden."""
STEAL_TIMEOUT_S: Final = 5.0
"""A victim that doesn't answer is asked again later; its grant, if there was one, returns by missed claims."""
STEAL_BACKOFF_S: Final = 0.02
STEAL_BACKOFF_S_MAX: Final = 1.0
"""Between asks that brought nothing. The last value bounds how late a thief finds work that no poke told it of."""
STEAL_PARKED_S: Final = 0.25
"""The least such time once the victim said that it will poke: asking sooner only takes from its time."""
THIEVES_PER_S_MAX: Final = 128
"""Asks of thieves without work that a leader wants to answer a second: when more are waiting, each is told to ask less often. One
of them finds work as soon as before."""
REFERRAL_S: Final = 1.0
"""A holder that was named to thieves counts for less this long, or until it says what it holds: that may take many seconds."""
COMPLETION_DELAY_S: Final = 0.01
"""Completions wait this long for company: one message and one signature carry many."""
WORKER_IDLE_S: Final = 30.0
"""A job's idle worker processes are kept this long on a peer that has nothing to do for it."""
ANNOUNCE_S: Final = 5.0
"""A leader repeats its job's announcement to its neighbours, so that one lost message costs seconds only."""
JOB_FORGET_S: Final = 20.0
"""A job of which nothing was heard for this long is no longer asked for work."""
CONTROL_TIMEOUT_S: Final = 10.0
"""For one request about a job to the peer that leads it."""
POLL_S_MAX: Final = 20.0
"""A follower's long poll ends after this time at the latest, and is made again."""
WORKER_EXIT_S: Final = 1.0
"""For a worker that closed its channel to end by itself, so that its own exit status is told; then it is killed."""
WORKER_RESTART_S: Final = 0.2
"""Before a worker is started after one that could not start: what was missing (memory, say) may be back."""
RESEND_S: Final = 5.0
"""Completions for which the leader has no word for so long are sent again, though the connection stands."""

# ---- tasks -----------------------------------------------------------------------------------------------------------

RETRIES_LOST_MAX: Final = 3
"""A task whose worker died this often while it ran is given up: it most likely kills its workers."""
TASKS_MAX: Final = 1 << 40
"""Task numbers of a stage; far over what a job can reach, far under what msgpack can't carry."""
STAGES_MAX: Final = 1_000_000
"""Stages of a job, children of tasks included: each costs the leader about a KiB."""
WORKERS_BLOCKED_MAX: Final = 256
"""Workers of one peer that may wait for children of their tasks: each is a process."""
GRAIN_TASKS_MAX: Final = 1 << 17
"""Tasks in a bundle however short they are: bounds what one lost worker makes run again."""
TICKETS_AHEAD: Final = 2
"""Bundles a worker has at once while tasks are short, so that it never waits for its peer."""

# ---- memory ----------------------------------------------------------------------------------------------------------

SEGMENT_INLINE_BYTES: Final = 64 << 10
"""A segment up to this size travels in the grant itself; a larger one is a blob the thief fetches."""
GRANT_BYTES_MAX: Final = 768 << 10
"""Inline segments of one grant, so that a grant stays under a frame."""
RESULT_INLINE_BYTES: Final = 64 << 10
"""A result up to this size travels in the completion itself; a larger one is a blob the leader fetches."""
COMPLETION_BYTES_MAX: Final = 512 << 10
"""Inline results of one completion message."""
ARGUMENT_MEMORY_BYTES_MAX: Final = 64 << 20
"""Argument segments a leader keeps in memory; above it they go to the blob store."""
SHARED_BYTES_MAX: Final = 1 << 30
SHARED_SHARE: Final = 0.125
"""Argument pages that one driver has in memory which processes share, and the share of the machine's available memory that they
may take as a driver starts: beyond it they go to disk."""
RESULT_MEMORY_BYTES_MAX: Final = 64 << 20
"""Results a leader keeps in memory until they are consumed; above it they go to the blob store."""
CREDIT_BYTES: Final = 16 << 20
"""Result bytes on their way to a reader that has not said it consumed them."""
TASKS_AHEAD_MAX: Final = 1 << 21
"""Unfinished tasks of one stage before its producer is throttled."""
ARGUMENT_BYTES_AHEAD_MAX: Final = 4 << 30
"""Argument bytes of unfinished tasks (in memory and on disk) of one stage before its producer is throttled."""
FUNCTION_BYTES_MAX: Final = 64 << 20
"""A pickled function with what it captured."""
OUTPUT_FILE_BYTES_MAX: Final = 2 << 30
"""Files that a driver leaves, together: more is an error that says so."""
OUTPUT_FILES_MAX: Final = 10_000
LOG_BYTES_MAX: Final = 1 << 30
"""A driver's stdout or stderr on the leader's disk."""
FREE_BYTES_MIN: Final = 32 << 20
"""Free disk below which a driver's output ends its job, and blobs that nobody pins go: what a log has taken and not written yet
(8 MiB) is written to it and to the output, and the log's last 12 MiB are copied when it is cut."""
PRINT_BYTES_MAX: Final = 4 << 20
"""Prints of tasks that a leader keeps for followers: a ring, the oldest go first."""
PRINT_BYTES_PER_S: Final = 256 << 10
"""Prints that one peer sends to the leader of a job; the rest is counted and said once."""

# ---- tables ----------------------------------------------------------------------------------------------------------

JOBS_KNOWN_MAX: Final = 512
"""Jobs a peer remembers from announcements; the ones longest unheard of go first."""
NEIGHBOURS: Final = 8
"""Peers to which announcements are passed on: a random graph of this degree is connected with near certainty."""
WAITING_THIEVES_MAX: Final = 32
"""Thieves a victim pokes when it has work again; others find it by asking."""
SEEKING_MAX: Final = 4_096
"""Thieves that a leader counts as being without work."""
HINTS_MAX: Final = 4
"""Other holders of work named in an empty answer."""
HOLDERS_MAX: Final = 16
"""Holders of one blob that a leader remembers and names."""
HAVE_MAX: Final = 256
"""Blobs named in one heartbeat as newly held."""
DECLARATIONS_KEPT_MAX: Final = 4_096
"""Stage declarations a thief keeps for one job."""
TEXT_MAX: Final = 64 << 10
"""A traceback or message that is passed on."""
PREFETCH_SEGMENTS: Final = 8
"""Segments of the deque's head whose blobs are fetched before they are needed."""
