"""Every rank watches the others, so that one that dies, stops or hangs ends all of them, and is named.

Collectives do not return when a rank is missing, or say "connection closed by peer" on ranks that did nothing wrong.
So two threads of each rank look on, whatever the main thread is blocked in:

- *beats* says once a second at the ranks' common store what this rank does (:class:`~abyssal.parallel.watch_beat.Beat`)
  and reads whether the run has failed.  Rank 0's beats judge all ranks; every rank judges rank 0.  So the traffic grows
  with the ranks and not with their square, at the price that another machine's rank is given up a beat later.
- *guard* waits for what cannot wait for a beat: the end of a rank's process on this machine, a signal, and a store that
  answers no more.

The first failure that reaches the store counts.  Every rank tells it in one message and ends at once, without exit
handlers, which would wait for collectives; then the launcher can start all of them again.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

from abyssal.parallel.launch_meeting import PROBLEMS, Peer, RankProblem, Store, describe
from abyssal.parallel.watch_beat import Beat, Judge
from abyssal.parallel.watch_exit import SignalPipe, leave_process, tell_at_once
from abyssal.parallel.watch_failure import Failure, Kind
from abyssal.parallel.watch_peers import LocalPeers
from abyssal.parallel.watch_slow import SlowRank, SlowRanks
from abyssal.parallel.watch_stack import main_thread_stack, main_thread_stands, raised_waiting, root_of

_FAILURE = "failure"
LAST_WORD = 0.5
"""Seconds that the main thread has to say so when another rank is gone; it may be computing."""
GRACE = 3.0
"""Seconds that a rank which was told to end, or has lost the store, gives the reason to arrive."""
LEAVING = 30.0
"""Seconds that the main thread has to get out, once it has a problem to tell the user."""
SIGTERM_EXIT = 128 + signal.SIGTERM


@dataclass(frozen=True)
class WatchOptions:
    """How a rank watches."""

    timeout: float = 60.0
    """Seconds of silence, or without progress while others wait, after which a rank ends the run."""
    name: str = "abyssal"
    """Begins the message."""
    on_gpu: bool = False

    @property
    def interval(self) -> float:
        """Seconds between beats."""
        return min(1.0, self.timeout / 10)


class Watch:
    """This rank's side; a context manager around all that the rank does.

    Leaving it with an exception publishes that, and ends the process where the exception is no problem of the user's;
    leaving it without one waits, on rank 0, for the others to leave.

    Args:
        open_store: connects to the ranks' common store, for the thread of the beats alone: it must not wait for
            whatever the main thread does with another connection.
        me, peers: of :meth:`~abyssal.parallel.launch_meeting.Meeting.roll_call`.
        leave: ends the process with an exit code; another in tests.
        tell: shows a message; another in tests.
    """

    def __init__(
        self,
        open_store: Callable[[], Store],
        me: Peer,
        peers: Sequence[Peer],
        options: WatchOptions | None = None,
        leave: Callable[[int], None] = leave_process,
        tell: Callable[[str], None] = tell_at_once,
    ) -> None:
        self._options = options or WatchOptions()
        self._me, self._peers = me, list(peers)
        self._open_store, self._leave, self._tell = open_store, leave, tell
        self._local = LocalPeers(me, peers)
        self._beat, self._beats = Beat(0), dict[int, Beat]()
        self._place, self._moved = 0, time.monotonic()
        self._round = time.monotonic()  # when the last round of beats that was finished began
        self._gone: set[int] = set()
        self._slow: list[SlowRank] = []
        self._failure: Failure | None = None
        self._waited_for, self._lost = "", threading.Event()
        self._lock, self._ended = threading.Lock(), False
        self._wake, self._stop = threading.Event(), threading.Event()
        self._leaving, self._over = threading.Event(), threading.Event()
        self._left_at = 0.0
        self._parent = os.getppid()

    # What the main thread says

    def mark(self, phase: str | None = None, patient: bool = False) -> None:
        """The main thread got on, and what it does now; ``patient``: standing still there is to be expected."""
        self._moved = time.monotonic()
        self._say(phase=self._beat.phase if phase is None else phase, patient=patient)

    @contextmanager
    def patient(self, phase: str) -> Iterator[None]:
        """Within, standing still is to be expected: reading, preparing, writing."""
        before = self._beat
        self.mark(phase, patient=True)
        yield  # after an exception the phase stays what it was then
        self.mark(before.phase, before.patient)

    def step_done(self, step: int, own_seconds: float) -> None:
        """A step is done, in so much time less what was spent waiting for other ranks."""
        beat = self._beat
        self._moved = time.monotonic()
        self._say(step=step, steps=beat.steps + 1, own_seconds=beat.own_seconds + own_seconds)

    def slow_ranks(self) -> list[tuple[SlowRank, Peer]]:
        """On rank 0, ranks found to be slow since the last call."""
        found, self._slow = self._slow, []
        return [(slow, self._peers[slow.rank]) for slow in found]

    def _say(self, **changes: object) -> None:
        with self._lock:  # the beats' thread changes other fields of it
            self._beat = replace(self._beat, **changes)  # pyright: ignore[reportArgumentType]

    # Beginning and end

    def __enter__(self) -> Watch:
        self._signals = SignalPipe()
        names = {self._send_beats: "watch beats", self._guard: "watch guard"}
        self._threads = [threading.Thread(target=task, name=name, daemon=True) for task, name in names.items()]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit):
            self._leave_well()
        else:
            self.report(error)
        self._close()

    def report(self, error: BaseException) -> None:
        """Let all ranks end by what was raised here; returns where the user is to be told of it in the usual way.

        To be called before anything is closed that may wait for other ranks; leaving the watch does what is left.
        """
        if self._leaving.is_set():
            return
        if not isinstance(error, (*PROBLEMS, KeyboardInterrupt)) or isinstance(error, ConnectionError):
            self._end_by(error)
            return
        self._left_at = time.monotonic()
        self._leaving.set()
        if not isinstance(error, RankProblem):  # the rank that has that tells
            interrupted = isinstance(error, KeyboardInterrupt)
            kind, text = ("interrupted", "") if interrupted else ("problem", describe(error))
            self._publish(self._own_failure(kind, text))

    def _leave_well(self) -> None:
        self.mark("ended", patient=True)
        self._say(left=True)
        self._wait_for_round()
        if self._me.rank == 0:  # it judges the others, and may keep the store
            while not self._stop.is_set() and not self._all_left():
                time.sleep(0.02)
                self._wake.set()

    def _all_left(self) -> bool:
        return len(self._beats) == len(self._peers) and all(beat.left for beat in self._beats.values())

    def _end_by(self, error: BaseException) -> None:
        """End all ranks, this one too: by the failure of another, where that may be what raised here."""
        text = "".join(traceback.format_exception(error))
        if raised_waiting(error, self._options.on_gpu) or isinstance(error, ConnectionError):
            root = root_of(error)
            if root is not error:  # it names what was waited for; the transport's own words help nobody
                self._waited_for = str(error).removesuffix(f": {root}").partition("\n")[0]
            self._lost.set()
            self.mark("lost the connection to another rank", patient=True)
            self._say(lost=True)
            self._wake.set()
            self._over.wait(self._options.timeout)  # the beats' thread ends the process when the cause is known
        self._end(self._publish(self._own_failure("failed", text)))

    def _own_failure(self, kind: Kind, text: str = "") -> Failure:
        return self._failure_of(kind, self._me.rank, self._beat, text=text)

    def _failure_of(self, kind: Kind, rank: int, beat: Beat, seconds: float = 0.0, text: str = "") -> Failure:
        peer = self._peers[rank]
        return Failure(kind, rank, peer.host, peer.pid, beat.step, beat.phase, seconds, text)

    def _publish(self, failure: Failure) -> Failure:
        """Make it the run's failure, unless there is one already; the one that counts."""
        if self._failure is None:
            self._failure = failure
        self._wait_for_round()
        return self._failure

    def _wait_for_round(self) -> None:
        """Return when a round of beats that began after the call is over, or none will be."""
        begin = time.monotonic()
        while self._round < begin and time.monotonic() - begin < GRACE and not self._stop.is_set():
            self._wake.set()
            time.sleep(0.005)

    def _close(self) -> None:
        self._stop.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(GRACE)
        self._signals.close()
        self._local.close()

    # The thread of the beats

    def _send_beats(self) -> None:
        options, first = self._options, self._me.rank == 0
        judge, slow = Judge(options.interval, options.timeout, standing=first), SlowRanks()
        try:
            store = self._open_store()
            while not self._stop.is_set():
                begin = time.monotonic()
                self._look_at_main_thread()
                self._one_round(store, judge, slow)
                self._round = begin
                self._wake.wait(options.interval)
                self._wake.clear()
        except Exception:  # of many kinds: the store's client raises what its network gives it
            self._lost_store()

    def _look_at_main_thread(self) -> None:
        stand = main_thread_stands(self._options.on_gpu)
        if stand.place != self._place:
            self._place, self._moved = stand.place, time.monotonic()
        still = time.monotonic() - self._moved
        long = still > self._options.timeout / 3 and not self._beat.patient
        stack = main_thread_stack() if long else ""
        self._say(number=self._beat.number + 1, still=still, waits=stand.waits, stack=stack)

    def _one_round(self, store: Store, judge: Judge, slow: SlowRanks) -> None:
        """Say how this rank is, read how the others are, and whether the run has failed."""
        me = self._me.rank
        store.set(f"beat/{me}", self._beat.to_json())
        if self._failed(store):
            return
        for rank in self._gone.copy():
            last = Beat.from_json(store.get(f"beat/{rank}")) if store.check([f"beat/{rank}"]) else Beat(0)
            self._gone.discard(rank)
            if not last.left:
                self._found(self._failure_of("ended", rank, last))
        watched = range(len(self._peers)) if me == 0 else [0]
        keys = [f"beat/{rank}" for rank in watched]
        if not store.check(keys):
            return  # some are about to send their first: they have come, and the ends of processes tell
        beats = dict(zip(watched, map(Beat.from_json, store.multi_get(keys)), strict=True))
        self._beats = beats
        verdict = judge.see(time.monotonic(), beats | {me: self._beat})
        if verdict is not None:
            beat = beats.get(verdict.rank, self._beat)
            self._found(self._failure_of(verdict.kind, verdict.rank, beat, verdict.seconds, beat.stack))
        elif me == 0:
            self._slow += slow.see([beats[rank] for rank in watched])

    def _failed(self, store: Store) -> bool:
        """Publish this rank's failure if it has one, and end by the one that counts."""
        if self._failure is not None:
            self._failure = Failure.from_json(store.compare_set(_FAILURE, "", self._failure.to_json()))
        elif store.check([_FAILURE]):
            self._failure = Failure.from_json(store.get(_FAILURE))
        else:
            return False
        self._round = time.monotonic()
        if not self._leaving.is_set():
            self._end(self._failure)
        return True

    def _found(self, failure: Failure) -> None:
        if self._failure is None:
            self._failure = failure
        self._wake.set()

    def _lost_store(self) -> None:
        """End by what is known here: a rank that kept the store and is gone, or that nobody can be asked any more."""
        self._stop.wait(0.3)  # the guard may be about to hear of an end
        if self._stop.is_set() or self._leaving.is_set():
            return
        gone = min(self._gone, default=None)
        if gone is None:
            self._end(self._failure or self._own_failure("unreachable"))
        else:
            self._end(self._failure or self._failure_of("ended", gone, self._beats.get(gone, Beat(0))))

    # The guard's thread

    def _guard(self) -> None:
        poll = select.poll()
        poll.register(self._signals.reader, select.POLLIN)
        ranks = {descriptor: rank for rank, descriptor in self._local.descriptors.items()}
        for descriptor in ranks:
            poll.register(descriptor, select.POLLIN)
        while not self._stop.is_set():
            for descriptor, _ in poll.poll(200):
                if descriptor == self._signals.reader:
                    self._signalled(self._signals.read())
                else:
                    poll.unregister(descriptor)
                    self._gone.add(ranks[descriptor])
                    self._wake.set()
            silent = time.monotonic() - self._round > self._options.timeout
            if silent or os.getppid() != self._parent:
                self._lost_store()
            if self._leaving.is_set() and time.monotonic() - self._left_at > LEAVING:
                self._end_leaving()

    def _signalled(self, numbers: bytes) -> None:
        """The launcher wants this rank to end: mostly because another has failed, which the beats are about to tell."""
        if signal.SIGTERM in numbers or signal.SIGINT in numbers:
            self._wake.set()
            self._stop.wait(GRACE)
            if not self._stop.is_set() and not self._leaving.is_set():
                self._stop.set()
                self._leave(SIGTERM_EXIT if signal.SIGTERM in numbers else 130)

    def _end_leaving(self) -> None:
        """The main thread does not get out: it waits for ranks that have ended by the same failure."""
        failure = self._failure or self._own_failure("interrupted")
        if self._me.rank == 0 and failure.kind == "problem":
            self._tell(f"{self._options.name}: {failure.text}")
        self._stop.set()
        self._leave(failure.exit_code)

    # The end

    def _end(self, failure: Failure) -> None:
        """Tell the failure and end this process."""
        with self._lock:
            first, self._ended = not self._ended, True
        if not first:  # another thread does
            self._over.wait(GRACE)
            return
        if failure.kind == "silent":
            self._local.kill(failure.rank)
        if failure.kind == "ended" and threading.current_thread() is not threading.main_thread():
            self._lost.wait(LAST_WORD)  # the main thread is about to find what it now waits for in vain
        if failure.kind == "problem":
            if self._me.rank == 0 and not self._leaving.wait(GRACE):  # it may be about to find the same problem
                self._tell(f"{self._options.name}: {failure.message(0, len(self._peers))}")
        elif failure.kind != "interrupted":
            here = f"\nrank {self._me.rank} was waiting: {self._waited_for}" if self._waited_for else ""
            self._tell(f"{self._options.name}: {failure.message(self._me.rank, len(self._peers))}{here}")
        if not self._leaving.is_set():
            self._stop.set()
            self._leave(failure.exit_code)
        self._over.set()
