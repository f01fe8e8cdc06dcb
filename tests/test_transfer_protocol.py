"""The protocol's two state machines over a link that loses, doubles, delays and reorders, with memory that is reused.

The link, the memory and the clock are models. What is checked needs none of the machines' own state: whose turn it is
with a block, and that what is said to be there is.
"""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispec.engine.transfer import Pulled, PullFailed, Released, RemoteBlocks
from dispec.engine.transfer import receiver as pulls
from dispec.engine.transfer import sender as offers
from dispec.engine.transfer.messages import Ask, Done, Gone, Read, Ready

LEASE, STALL, PATIENCE = 60.0, 20.0, 120.0
PEER = 1  # the puller's name at the source
NUM_BLOCKS, NUM_TRANSFERS = 6, 2
KEY = ("host", 1, "source")


@dataclass
class World:
    """One source and one puller. `reads_itself`: the puller copies from the source's memory, as with shared memory."""

    reads_itself: bool
    now: float = 0.0
    to_source: list[object] = field(default_factory=list)
    to_puller: list[object] = field(default_factory=list)
    checks: list[tuple[str, int]] = field(default_factory=list)
    sends: list[offers.SendBlocks] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    checking: tuple[str, int] | None = None
    writing: list[pulls.Fetch] = field(default_factory=list)
    published: dict[str, list[bytes]] = field(default_factory=dict)
    completed: set[str] = field(default_factory=set)
    withdrawn: set[str] = field(default_factory=set)
    released: dict[str, bool] = field(default_factory=dict)
    pulling: dict[str, int] = field(default_factory=dict)
    ended: dict[str, object] = field(default_factory=dict)
    is_linked: bool = False

    def __post_init__(self) -> None:
        self.offers, self.pulls = offers.Sender(LEASE, 4), pulls.Receiver(STALL, PATIENCE)
        self.versions = itertools.count(1)
        self.memory = {(transfer, place): b"" for transfer in range(NUM_TRANSFERS) for place in range(NUM_BLOCKS)}
        self.pages: dict[int, bytes] = {}

    def block(self, transfer: int, place: int) -> int:
        return transfer * NUM_BLOCKS + place

    def contents(self, block: int) -> bytes:
        return self.memory[divmod(block, NUM_BLOCKS)]

    # What the engines do.

    def publish(self, transfer: int, count: int, payload: bytes | None) -> None:
        name = f"t{transfer}"
        mine = self.published.setdefault(name, [])
        count = min(count, NUM_BLOCKS - len(mine))
        if name in self.completed or name in self.withdrawn or name in self.released:
            return
        blocks = [self.block(transfer, len(mine) + place) for place in range(count)]
        for block in blocks:
            self.memory[divmod(block, NUM_BLOCKS)] = next(self.versions).to_bytes(8, "big")
            mine.append(self.contents(block))
        if payload is not None:
            self.completed.add(name)
        outputs = self.offers.publish(name, blocks, payload, self.now)
        self.checks += [(name, block) for block in blocks]
        self.source_says(outputs)

    def withdraw(self, transfer: int) -> None:
        name = f"t{transfer}"
        if name not in self.released:
            self.published.setdefault(name, [])
            self.withdrawn.add(name)
            self.source_says(self.offers.withdraw(name, "the prefill failed", self.now))

    def pull(self, transfer: int, skip: int) -> None:
        name = f"t{transfer}"
        if name in self.pulling:
            return
        self.pulling[name] = skip
        own = [self.block(transfer, place) for place in range(NUM_BLOCKS - skip)]
        self.puller_says(self.pulls.begin(RemoteBlocks("source", name, "host", 1), skip, own, self.now))

    # What the machines say.

    def source_says(self, outputs: list[offers.Output]) -> None:
        for output in outputs:
            match output:
                case offers.Send(peer, message, payload):
                    assert peer == PEER
                    self.to_puller.append((message, payload))
                case offers.SendBlocks():
                    assert output.transfer_id not in self.released
                    self.sends.append(output)
                case Released(name, was_expired):
                    assert name in self.published
                    assert name not in self.released, "released twice"
                    assert not [send for send in self.sends if send.transfer_id == name], "released while it is sent"
                    assert self.checking is None or self.checking[0] != name, "released while it is read"
                    self.released[name] = was_expired
                    for place in range(NUM_BLOCKS):  # the engine uses the blocks for something else at once
                        self.memory[int(name[1:]), place] = next(self.versions).to_bytes(8, "big")

    def puller_says(self, outputs: list[pulls.Output]) -> None:
        for output in outputs:
            match output:
                case pulls.Send(_, message):
                    self.to_source.append(message)
                case pulls.Fetch() if self.reads_itself:
                    self.copies.append(output.read_id)
                case pulls.Fetch():
                    read = Read(output.transfer_id, output.read_id, output.first, len(output.own_blocks))
                    self.to_source.append(read)
                case Pulled(name, payload):
                    self.end(name, output)
                    skip = self.pulling[name]
                    assert name in self.completed
                    assert payload == name.encode()
                    found = [self.pages[self.block(int(name[1:]), place)] for place in range(NUM_BLOCKS - skip)]
                    assert found == self.published[name][skip:]
                case PullFailed(name):
                    self.end(name, output)
                case pulls.Drop():
                    self.is_linked = False
                    self.to_source.clear()
                    self.to_puller.clear()

    def end(self, name: str, event: object) -> None:
        assert name not in self.ended, "ended twice"
        assert not [fetch for fetch in self.writing if fetch.transfer_id == name], "ended while it is written"
        self.ended[name] = event

    # What the link and the threads do.

    def link(self) -> None:
        if not self.is_linked and any(name not in self.ended for name in self.pulling):
            self.is_linked = True
            self.puller_says(self.pulls.connected(KEY, STALL / 8, 2, self.now))

    def unlink(self) -> None:
        self.is_linked = False
        self.to_source.clear()
        self.to_puller.clear()
        self.offers.lost(PEER)
        self.puller_says(self.pulls.lost(KEY, "the connection broke"))

    def deliver(self, number: int, copies: int) -> None:
        """One of the messages under way, any of them, arrives `copies` times: 0 is lost."""
        box = [self.to_source, self.to_puller][number % 2]
        if not box:
            return
        message = box.pop(number // 2 % len(box))
        for _ in range(copies):
            match message:
                case Ask():
                    self.source_says(self.offers.ask(PEER, message, self.now))
                case Read():
                    self.source_says(self.offers.read(PEER, message, self.now))
                case Done():
                    self.source_says(self.offers.done(PEER, message, self.now))
                case (Ready() as ready, payload):
                    self.puller_says(self.pulls.ready(KEY, ready, payload, self.now))
                case (Gone() as gone, _):
                    self.puller_says(self.pulls.gone(KEY, gone, self.now))
                case (int() as read_id, contents):
                    self.receive(read_id, contents)

    def receive(self, read_id: int, contents: list[bytes] | None) -> None:
        """A read begins to be written, from the source's memory as it is now if it brings no contents."""
        fetch = self.pulls.touch(read_id, self.now)
        if fetch is None:
            return
        assert fetch.transfer_id not in self.ended, "written after the end"
        assert fetch not in self.writing, "written twice"
        contents = contents or [self.contents(block) for block in fetch.source_blocks]
        self.pages.update(zip(fetch.own_blocks, contents, strict=True))
        self.writing.append(fetch)

    def land(self) -> None:
        """The oldest of the reads that are being written is complete."""
        if self.writing:
            fetch = self.writing.pop(0)
            is_right = [self.pages[block] for block in fetch.own_blocks] == fetch.checksums
            problem = None if is_right else "the checksum is wrong"
            self.puller_says(self.pulls.landed(fetch.read_id, problem, self.now))

    def check(self) -> None:
        """Begin with a checksum, or end with the one begun."""
        if self.checking is not None:
            (name, block), self.checking = self.checking, None
            self.source_says(self.offers.checked(name, [self.contents(block)], self.now))
        elif self.checks:
            name, block = self.checks.pop(0)
            if self.offers.start_check(name):
                assert name not in self.released
                self.checking = name, block

    def send(self) -> None:
        if self.sends:
            sent = self.sends.pop(0)
            self.to_puller.append((sent.read_id, [self.contents(block) for block in sent.blocks]))
            self.source_says(self.offers.sent(sent.transfer_id, self.now))

    def copy(self, number: int) -> None:
        if self.copies:
            self.receive(self.copies.pop(number % len(self.copies)), None)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.source_says(self.offers.tick(self.now))
        self.puller_says(self.pulls.tick(self.now))

    def work(self) -> None:
        """Whatever the threads have to do."""
        while self.checks or self.checking or self.sends or self.copies or self.writing:
            self.check()
            self.send()
            self.copy(0)
            self.land()


def act(world: World, action: str, number: int) -> None:
    transfer, rest = number % NUM_TRANSFERS, number // NUM_TRANSFERS
    match action:
        case "publish":
            world.publish(transfer, rest % 4, None)
        case "complete":
            world.publish(transfer, NUM_BLOCKS, f"t{transfer}".encode())
        case "withdraw":
            world.withdraw(transfer)
        case "pull":
            world.pull(transfer, rest % 3)
            world.link()
        case "release":
            world.puller_says(world.pulls.release(f"t{transfer}"))
        case "deliver":
            world.deliver(number, 1)
        case "lose":
            world.deliver(number, 0)
        case "double":
            world.deliver(number, 2)
        case "check":
            world.check()
        case "send":
            world.send()
        case "copy" | "land":
            world.copy(number) if action == "copy" else world.land()
        case "work":
            world.work()
        case "wait":
            world.pass_time((0.1, 5.1, 21.0, 61.0)[number % 4])
        case "unlink":
            world.unlink()


ACTIONS = st.sampled_from(  # most of the time things go as they should: otherwise nothing gets far
    ("publish", "complete", "withdraw", "pull", "release", "release", "check", "check", "send", "copy", "land", "work")
    + ("deliver",) * 8
    + ("lose", "double", "double", "wait", "unlink")
)


@pytest.mark.parametrize("reads_itself", [False, True], ids=["over the connection", "by itself"])
@given(script=st.lists(st.tuples(ACTIONS, st.integers(0, 31)), min_size=50, max_size=90))
@settings(max_examples=250, deadline=None)
def test_whatever_the_link_does_nothing_wrong_is_read_and_all_ends(
    reads_itself: bool, script: list[tuple[str, int]]
) -> None:
    world = World(reads_itself)
    world.pull(0, 1)
    world.link()
    world.publish(0, 3, None)
    for action, number in script:
        act(world, action, number)
    for transfer in range(NUM_TRANSFERS):  # engines do not forget what they began
        if f"t{transfer}" in world.published and f"t{transfer}" not in world.completed:
            world.withdraw(transfer)
    for _ in range(20):
        world.work()
        world.to_source.clear()
        world.to_puller.clear()
        world.pass_time(LEASE / 2)
    assert set(world.ended) == set(world.pulling)
    assert set(world.released) == set(world.published)
    assert world.offers.num_offers == world.pulls.num_pulls == 0
    assert world.offers.next_deadline is None
    assert world.pulls.next_deadline is None


@pytest.mark.parametrize("reads_itself", [False, True], ids=["over the connection", "by itself"])
@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    skip=st.integers(0, 5),
    order=st.lists(st.integers(0, 31), min_size=60, max_size=60),
    lost=st.sets(st.integers(0, 12), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_what_is_late_or_asked_for_again_arrives(
    reads_itself: bool, sizes: list[int], skip: int, order: list[int], lost: set[int]
) -> None:
    """Messages of one direction in any order, and a few questions lost: nothing else is sent twice."""
    world = World(reads_itself)
    world.pull(0, skip)
    world.link()
    for size in sizes:
        world.publish(0, size, None)
        world.check()
    world.publish(0, NUM_BLOCKS, b"t0")
    for turn, number in enumerate(order):
        world.work()
        if turn in lost:
            world.to_source = [message for message in world.to_source if not isinstance(message, Ask)]
        world.deliver(2 * number, 1)
        world.deliver(2 * number + 1, 1)
        if world.ended:
            break
        world.pass_time(STALL / 8)
    assert world.ended == {"t0": Pulled("t0", b"t0")}
    world.puller_says(world.pulls.release("t0"))
    for _ in order:
        world.deliver(0, 1)
        world.deliver(1, 1)
    assert world.released == {"t0": False}


def offered(count: int, payload: bytes | None = b"") -> offers.Sender:
    """Transfer "a" with `count` blocks, checked at time 0."""
    machine = offers.Sender(LEASE, 4)
    machine.publish("a", range(count), payload, 0.0)
    for block in range(count):
        assert machine.start_check("a")
        machine.checked("a", [block.to_bytes(8, "big")], 0.0)
    return machine


def test_the_lease_runs_from_the_last_publish_and_any_contact_renews_it() -> None:
    machine = offered(2, payload=None)
    assert machine.next_deadline is None, "the engine is still at it"
    machine.publish("a", [], b"", 100.0)
    assert machine.tick(159.9) == []
    machine.ask(PEER, Ask("a", 2, True), 159.9)
    assert machine.tick(219.8) == []
    (read,) = machine.read(PEER, Read("a", 0, 0, 2), 219.8)
    assert isinstance(read, offers.SendBlocks)
    assert Released("a", True) not in machine.tick(1000.0), "a read of ours is under way"
    machine.sent("a", 1000.0)
    assert machine.tick(1059.9) == []
    outputs = machine.tick(1060.0)
    assert outputs[-1] == Released("a", was_expired=True)
    assert [type(output.message) for output in outputs[:-1] if isinstance(output, offers.Send)] == [Gone]


def test_withdrawn_blocks_wait_for_who_reads_by_itself() -> None:
    machine = offered(2)
    machine.ask(PEER, Ask("a", 0, False), 0.0)
    (told,) = machine.withdraw("a", "aborted", 1.0)
    assert told == offers.Send(PEER, Gone("a", "aborted"))
    assert machine.done(PEER, Done("a"), 2.0) == [Released("a", was_expired=False)]


def test_a_transfer_cancelled_before_the_source_knew_it_is_released_when_published() -> None:
    machine = offers.Sender(LEASE, 4)
    machine.ask(PEER, Ask("a", 0, False), 0.0)
    assert machine.done(PEER, Done("a"), 0.0) == []
    assert machine.publish("a", [1], None, 1.0) == [Released("a", was_expired=False)]
    assert machine.publish("a", [2], b"", 1.0) == []


def test_reads_beyond_what_is_ready_are_refused() -> None:
    machine = offered(3)
    for first, count in ((0, 4), (3, 1), (1 << 39, 1)):
        (output,) = machine.read(PEER, Read("a", 0, first, count), 0.0)
        assert isinstance(output, offers.Send)
        assert isinstance(output.message, Gone)


def test_a_silent_source_is_given_up() -> None:
    machine = pulls.Receiver(STALL, PATIENCE)
    machine.begin(RemoteBlocks("source", "a", "host", 1), 0, [1], 0.0)
    machine.connected(KEY, STALL / 4, 2, 0.0)
    machine.tick(19.9)
    outputs = machine.tick(20.0)
    assert [type(output) for output in outputs[-2:]] == [pulls.Drop, PullFailed]
