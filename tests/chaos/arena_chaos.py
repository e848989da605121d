"""Random kills of the processes of a shared-memory store, and what must be true all the time.

    python tests/chaos/arena_chaos.py [--minutes M] [--seed S] [--json FILE]
    python tests/chaos/arena_chaos.py --cycles N [--json FILE]

Two writers, three readers and a collector live in one run; this process gives them work, kills them at random instants,
one or several at once, and starts others in their place. It knows what is stored. Readers compare every byte they get
with the pattern of the sample's name, and again when they let go of it. Nothing that was aborted may be got again,
nothing else may be missing. Between times everybody pauses, and the arenas themselves are looked at.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import itertools
import json
import multiprocessing
import os
import platform
import random
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import arena_cycles
import numpy as np
from arena_roles import MAX_HELD, READY, ROLES, RUN, Pair, size_of

from specforge.contracts.codec import dumps, loads
from specforge.contracts.refs import SampleRef
from specforge.data_plane.arena import (
    FREE,
    LIVE,
    NUM_BYTES,
    OFFSET,
    OLD_OFFSET,
    SERIAL,
    STATE,
    Arena,
    list_arenas,
)
from specforge.data_plane.processes import ProcessIdentity
from specforge.data_plane.shared_memory import SHARED_MEMORY, SharedMemoryFeatureStore

CAPACITY = 2 << 20
LARGEST = CAPACITY // 64
TEAM = {"writer": 2, "reader": 3, "collector": 1}
KILL_EVERY_S = 0.5
CHECK_EVERY_S = 3.0
DEADLINE_S = 60.0


class Violation(AssertionError):
    """Something that must always be true was not."""


@dataclass(eq=False)
class Member:
    """A process, and the requests that it has not answered: tag -> (request, what it is about)."""

    role: str
    process: Any
    pipe: Connection
    waiting: dict[int, tuple[str, Any]] = field(default_factory=dict)
    arena: str | None = None


@dataclass(eq=False)
class Sample:
    """``aborted`` is what the parent knows: not, perhaps (an abort was sent), or certainly (it was answered)."""

    ref: SampleRef
    aborted: str = "not"

    @property
    def arena(self) -> str:
        return self.ref.key.partition(":")[0]


class ArenaChaos:
    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.kills: collections.Counter[str] = collections.Counter()
        self.members: list[Member] = []
        self.samples: dict[Pair, Sample] = {}
        self.arenas: dict[str, set[Pair]] = {}
        self.live_bytes: collections.Counter[str] = collections.Counter()
        self.gone: collections.deque[Sample] = collections.deque(maxlen=200)
        self.torn: list[list[Pair]] = []
        self.unsure: list[Pair] = []
        self.tags, self.names = itertools.count(), itertools.count()
        self.targets: dict[str, float] = {}
        self.context = multiprocessing.get_context("forkserver")
        # What costs time to import; the server finds installed packages only.
        self.context.set_forkserver_preload(["specforge.data_plane.shared_memory", "specforge.testing.feature_store"])

    def run(self, seconds: float) -> dict[str, Any]:
        """Chaos for so long; the counts. Raises ``Violation``; whatever happens, no process and no file stay."""
        started = time.monotonic()
        next_kill, next_check, next_word = (started + delay for delay in (KILL_EVERY_S, CHECK_EVERY_S, 60.0))
        try:
            while (now := time.monotonic()) < started + seconds:
                self.recruit()
                self.hand_out_work()
                self.listen(0.02)
                if now > next_kill:
                    self.kill_some()
                    next_kill = now + self.random.expovariate(1 / KILL_EVERY_S)
                if now > next_check:
                    self.check()
                    next_check = time.monotonic() + CHECK_EVERY_S
                if now > next_word:
                    print(f"{now - started:6.0f} s  {dict(self.kills)}  {dict(self.counts)}", flush=True)
                    next_word = now + 60.0
            self.finish()
        finally:
            for member in self.members:
                member.process.kill()
                member.process.join()
                member.pipe.close()
        self.counts["seconds"] = round(time.monotonic() - started)
        return {"kills": dict(self.kills), "num_kills": self.kills.total(), **self.counts}

    # Who works.

    def recruit(self) -> None:
        """As many processes of each role as there must be."""
        for role, number in TEAM.items():
            for _ in range(number - sum(member.role == role for member in self.members)):
                ours, theirs = self.context.Pipe()
                arguments = (theirs, self.directory, CAPACITY) if role == "writer" else (theirs, self.directory)
                process = self.context.Process(target=ROLES[role], args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.members.append(Member(role, process, ours, {READY: ("start", None)}))
                self.counts["processes"] += 1

    def kill_some(self) -> None:
        """One, now and then several, rarely all; now and then a writer is asked to leave instead."""
        number = self.random.choices([1, 2, 3, len(self.members)], [70, 15, 10, 5])[0]
        victims = self.random.sample(self.members, min(number, len(self.members)))
        for victim in victims:
            os.kill(victim.process.pid, signal.SIGKILL)
        for victim in victims:
            victim.process.join(DEADLINE_S)
            self.kills[victim.role] += 1
            self.bury(victim)

    def bury(self, member: Member) -> None:
        """What it said before it died counts; what it did not answer may have happened or not."""
        with contextlib.suppress(EOFError, ConnectionError):
            while member.pipe.poll():
                self.hear(member, member.pipe.recv())
        for request, about in member.waiting.values():
            if request == "put":
                self.torn.append(about)
            elif request == "abort":
                self.unsure += about
        member.pipe.close()
        self.members.remove(member)

    # What they do.

    def ask(self, member: Member, request: str, *arguments: Any, about: Any = None) -> None:
        tag = next(self.tags)
        member.waiting[tag] = (request, about)
        with contextlib.suppress(ConnectionError):
            member.pipe.send((tag, request, *arguments))

    def hand_out_work(self) -> None:
        for member in self.members:
            if READY in member.waiting or len(member.waiting) >= 3:
                continue
            if member.role == "writer":
                self.order_puts(member)
            elif member.role == "reader":
                self.order_gets(member)
            self.order_aborts(member)

    def order_puts(self, writer: Member) -> None:
        """Towards a share of the arena that changes; above 75 % there are refusals."""
        arena = writer.arena or ""
        if self.live_bytes[arena] < self.targets.get(arena, 0.7) * CAPACITY:
            batch = []
            for _ in range(self.random.randint(1, 24)):
                num_bytes = int(2 ** self.random.uniform(9, 14.99)) - self.random.randrange(256)
                batch.append((f"sample-{next(self.names)}", self.random.randint(1, 3), num_bytes))
            self.ask(writer, "put", batch, about=[(name, generation) for name, generation, _ in batch])
        else:
            self.targets[arena] = self.random.uniform(0.6, 0.98)
        if self.random.random() < 0.5:
            names = [f"churn-{next(self.names)}" for _ in range(20)]
            self.ask(writer, "churn", names, self.random.randrange(1, LARGEST // 2))

    def order_gets(self, reader: Member) -> None:
        candidates = [sample for sample in self.samples.values() if sample.aborted != "certainly"]
        chosen = self.random.sample(candidates, min(len(candidates), self.random.randint(1, 16)))
        if self.gone and self.random.random() < 0.3:
            chosen += self.random.sample(self.gone, min(len(self.gone), 3))
        # What is certainly aborted now must not be found; that it was known now is what counts.
        about = [(sample, sample.aborted == "certainly") for sample in chosen]
        texts = [dumps(sample.ref) for sample in chosen]
        self.ask(reader, "get", texts, self.random.randint(0, MAX_HELD), about=about)

    def order_aborts(self, member: Member) -> None:
        """Of samples in arenas that are full enough or whose writers are dead; and again where an answer is missing."""
        if member.role == "collector":
            return
        pairs, self.unsure = self.unsure, []
        living = {writer.arena for writer in self.members if writer.role == "writer"}
        for arena, stored in self.arenas.items():
            full_enough = self.live_bytes[arena] > (self.targets.get(arena, 0.7) - 0.1) * CAPACITY
            if self.random.random() < (0.6 if full_enough else 0.1 if arena in living else 0.2):
                pairs += self.random.sample(tuple(stored), min(len(stored), self.random.randint(1, 12)))
        pairs = [pair for pair in dict.fromkeys(pairs) if pair not in self.samples or self.mark(pair)]
        if pairs:
            self.ask(member, "abort", pairs, about=pairs)

    def mark(self, pair: Pair) -> bool:
        self.samples[pair].aborted = "perhaps"
        return True

    def listen(self, seconds: float) -> None:
        """Hear whoever says something in the next so many seconds."""
        for pipe in wait([member.pipe for member in self.members], seconds):
            member = next(member for member in self.members if member.pipe is pipe)
            try:
                self.hear(member, member.pipe.recv())
            except (EOFError, ConnectionError):
                raise Violation(f"a {member.role} died by itself: exit code {member.process.exitcode}") from None

    def hear(self, member: Member, message: tuple[int, Any, list[str]]) -> None:
        tag, result, complaints = message
        if complaints:
            raise Violation("; ".join(complaints))
        request, about = member.waiting.pop(tag)
        if request == "put":
            self.heard_put(member, result)
        elif request == "get":
            self.heard_get(about, result)
        elif request == "abort":
            self.heard_abort(about)

    def heard_put(self, writer: Member, result: tuple[list[str] | None, int]) -> None:
        texts, num_moves = result
        self.counts["moves"] += num_moves
        if texts is None:
            self.counts["refusals"] += 1
            return
        for sample in [Sample(loads(SampleRef, text)) for text in texts]:
            pair = sample.ref.sample_id, sample.ref.generation
            writer.arena = sample.arena
            self.samples[pair] = sample
            self.arenas.setdefault(sample.arena, set()).add(pair)
            self.live_bytes[sample.arena] += sample.ref.num_bytes
            self.counts["puts"] += 1

    def heard_get(self, asked: Sequence[tuple[Sample, bool]], found: Sequence[bool]) -> None:
        for (sample, was_gone), is_found in zip(asked, found, strict=True):
            if is_found and was_gone:
                raise Violation(f"{sample.ref.sample_id} was got after its abort, key {sample.ref.key}")
            if not is_found and sample.aborted == "not":
                raise Violation(f"{sample.ref.sample_id} is lost, key {sample.ref.key}")
            self.counts["gets" if is_found else "gets_of_aborted"] += 1
            self.counts["verified_bytes"] += is_found * size_of(sample.ref)

    def heard_abort(self, pairs: Sequence[Pair]) -> None:
        for pair in pairs:
            sample = self.samples.pop(pair, None)
            if sample is not None:
                sample.aborted = "certainly"
                self.arenas[sample.arena].remove(pair)
                self.live_bytes[sample.arena] -= sample.ref.num_bytes
                self.gone.append(sample)
                self.counts["aborts"] += 1

    # What must be true.

    def check(self) -> None:
        """Everybody pauses; nobody is killed meanwhile."""
        self.counts["checks"] += 1
        collector = [member for member in self.members if member.role == "collector"]
        for member in collector:
            self.ask(member, "be still")
        if self.random.random() < 0.5:
            self.release_all()
        self.settle()
        store = SharedMemoryFeatureStore.attach(RUN, self.directory)
        try:
            self.check_store(store)
            self.check_files()
        finally:
            store.close()
        for member in collector:
            self.ask(member, "go on")

    def release_all(self) -> None:
        for member in self.members:
            if member.role == "reader":
                self.ask(member, "release", 0)

    def settle(self) -> None:
        """Until every question is answered."""
        deadline = time.monotonic() + DEADLINE_S
        while any(member.waiting for member in self.members):
            self.listen(0.1)
            if time.monotonic() > deadline:
                raise Violation(f"no answer in {DEADLINE_S} s: {[(m.role, m.waiting) for m in self.members]}")

    def check_store(self, store: SharedMemoryFeatureStore) -> None:
        stored = store.stored()
        if len(set(stored)) < len(stored):
            raise Violation(f"listed twice: {[pair for pair in stored if stored.count(pair) > 1][:5]}")
        for batch in self.torn:
            self.counts["torn_puts"] += 1
            if 0 < sum(pair in stored for pair in batch) < len(batch):
                raise Violation(f"part of a put is readable: {batch}")
        strays = [pair for batch in self.torn for pair in batch]
        strays += [pair for pair in stored if pair[0].startswith("churn")] + self.unsure
        self.torn, self.unsure = [], []
        store.abort(strays)
        self.heard_abort(strays)
        store.gc()
        if sorted(store.stored()) != sorted(self.samples):
            difference = set(store.stored()) ^ set(self.samples)
            raise Violation(f"stored and known differ: {sorted(difference)[:10]}")
        found = store.live([sample.ref for sample in self.samples.values()])
        again = store.live([sample.ref for sample in self.gone])
        if not all(found) or any(again):
            raise Violation(f"{found.count(False)} of the stored are not live, {again.count(True)} of the aborted are")

    def check_files(self) -> None:
        """After a ``gc``: links and arenas are there for a reason, and no two buffers share a byte."""
        living = {member.process.pid for member in self.members} | {os.getpid()}
        self.arenas = {arena: stored for arena, stored in self.arenas.items() if stored}
        for name, file_name in list_arenas(self.directory, None):
            if file_name == str(name):
                if name.writer.pid not in living and file_name not in self.arenas:
                    raise Violation(f"the arena of a dead writer was not collected: {file_name}")
                self.check_arena(Arena.open(self.directory, name), file_name)
                continue
            owner = ProcessIdentity.parse(str((self.directory / file_name).readlink()))
            if owner is None or owner.is_dead():
                raise Violation(f"the lane link of a dead process: {file_name} -> {owner}")

    def check_arena(self, arena: Arena | None, file_name: str) -> None:
        if arena is None:
            raise Violation(f"{file_name} cannot be opened")
        live = arena.entries[arena.readable()]
        num_bytes, known = int(live[:, NUM_BYTES].sum()), self.live_bytes[file_name]
        if num_bytes != known:
            raise Violation(f"{file_name}: {num_bytes} bytes are live, {known} are known")
        keys = {self.samples[pair].ref.key for pair in self.arenas.get(file_name, ())}
        serials = {int(key.rpartition(":")[2]) for key in keys}
        if {int(serial) for serial in live[:, SERIAL]} != serials:
            raise Violation(f"{file_name}: other serials than in the keys")
        used = arena.entries[arena.entries[:, STATE] != FREE]
        end = 0
        for begin, num_bytes in sorted(ranges(used)):
            if begin < end or begin + num_bytes > arena.shape.data_bytes:
                raise Violation(f"{file_name}: buffers overlap at byte {begin}")
            end = begin + num_bytes
        self.counts["buffers_checked"] += len(used)
        arena.close()

    def finish(self) -> None:
        """The last check, then everybody goes, each in its way; what is left is aborted and collected."""
        self.recruit()
        self.check()
        for member in list(self.members):
            if member.role == "writer":
                self.ask(member, self.random.choice(["leave", "close"]))
                self.listen_to(member)
            member.process.kill()
            member.process.join(DEADLINE_S)
            self.bury(member)
        store = SharedMemoryFeatureStore.attach(RUN, self.directory)
        store.abort(store.stored())
        store.gc()
        store.close()
        left = [path.name for path in self.directory.iterdir()]
        if left:
            raise Violation(f"files stay behind: {left}")

    def listen_to(self, member: Member) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while member.waiting and time.monotonic() < deadline:
            self.listen(0.1)


def ranges(entries: np.ndarray) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what ``entries`` point to; old places too, while a reader may look there."""
    for words in entries.tolist():
        if words[NUM_BYTES]:
            for offset in {words[OFFSET], words[OLD_OFFSET]} if words[STATE] == LIVE else {words[OFFSET]}:
                yield offset, words[NUM_BYTES]


def chaos(seconds: float, seed: int) -> dict[str, Any]:
    """In a directory of its own in shared memory, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="specforge-chaos-", dir=SHARED_MEMORY) as name:
        result = ArenaChaos(Path(name), seed).run(seconds)
    return {"seed": seed, **result, "violations": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--cycles", type=int, help="no kills: so many lives of samples, and what they leave behind")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    report = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    if arguments.cycles:
        report |= arena_cycles.cycles(arguments.cycles, arguments.seed)
    else:
        report |= chaos(arguments.minutes * 60, arguments.seed)
    print(json.dumps(report), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
