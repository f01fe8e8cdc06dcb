"""The protocol's two state machines over a network that loses, doubles, delays and reorders, with reused blocks.

Network, memory and clock are models. The checks use no state of the machines: no block is read or written after its
transfer has ended, and every block reported as pulled holds what was published.
"""

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispec.engine.transfer import receiver, sender
from dispec.engine.transfer.interface import Pulled, PullFailed, Released, RemoteBlocks
from dispec.engine.transfer.messages import BlocksReady, PullDone, QueryBlocks, ReadBlocks, TransferEnded
from dispec.engine.transfer.receiver import Receiver
from dispec.engine.transfer.sender import Sender

pytestmark = pytest.mark.smoke

LEASE, QUERY, PULL = 60.0, 2.5, 120.0  # seconds
PEER = 1  # the puller's number at the source
NUM_BLOCKS, NUM_TRANSFERS = 6, 2
KEY = ("host", 1, "source")


@dataclass
class World:
    """One source and one puller. maps_memory: the puller copies from the source's memory, as with shared memory."""

    maps_memory: bool
    now: float = 0.0
    to_source: list[object] = field(default_factory=list)
    to_puller: list[object] = field(default_factory=list)
    checks: list[tuple[str, int]] = field(default_factory=list)
    sends: list[sender.SendBlocks] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    checking: tuple[str, int] | None = None
    writing: list[receiver.Fetch] = field(default_factory=list)
    published: dict[str, list[bytes]] = field(default_factory=dict)
    completed: set[str] = field(default_factory=set)
    withdrawn: set[str] = field(default_factory=set)
    released: dict[str, bool] = field(default_factory=dict)
    pulling: dict[str, int] = field(default_factory=dict)
    ended: dict[str, object] = field(default_factory=dict)
    is_connected: bool = False

    def __post_init__(self) -> None:
        self.sender, self.receiver = Sender(LEASE), Receiver(PULL)
        self.versions = itertools.count(1)
        self.memory = {(transfer, place): b"" for transfer in range(NUM_TRANSFERS) for place in range(NUM_BLOCKS)}
        self.pages: dict[int, bytes] = {}

    def block(self, transfer: int, place: int) -> int:
        return transfer * NUM_BLOCKS + place

    def contents(self, block: int) -> bytes:
        return self.memory[divmod(block, NUM_BLOCKS)]

    # Engines.

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
        outputs = self.sender.publish(name, blocks, payload, self.now)
        self.checks += [(name, block) for block in blocks]
        self.source_says(outputs)

    def withdraw(self, transfer: int) -> None:
        name = f"t{transfer}"
        if name not in self.released:
            self.published.setdefault(name, [])
            self.withdrawn.add(name)
            self.source_says(self.sender.withdraw(name, "the prefill failed", self.now))

    def pull(self, transfer: int, skip: int) -> None:
        name = f"t{transfer}"
        if name in self.pulling:
            return
        self.pulling[name] = skip
        own = [self.block(transfer, place) for place in range(NUM_BLOCKS - skip)]
        self.puller_says(self.receiver.pull(RemoteBlocks("source", name, "host", 1), skip, own, self.now))

    # Outputs of the state machines.

    def source_says(self, outputs: list[sender.Output]) -> None:
        for output in outputs:
            match output:
                case sender.Send(peer, message):
                    assert peer == PEER
                    self.to_puller.append(message)
                case sender.SendBlocks():
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

    def puller_says(self, outputs: list[receiver.Output]) -> None:
        for output in outputs:
            match output:
                case receiver.Send(_, message):
                    self.to_source.append(message)
                case receiver.Fetch() if self.maps_memory:
                    self.copies.append(output.read_id)
                case receiver.Fetch():
                    read = ReadBlocks(output.transfer_id, output.read_id, output.first, len(output.own_blocks))
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

    def end(self, name: str, event: object) -> None:
        assert name not in self.ended, "ended twice"
        assert not [fetch for fetch in self.writing if fetch.transfer_id == name], "ended while it is written"
        self.ended[name] = event

    # Network and threads.

    def connect(self) -> None:
        if not self.is_connected and any(name not in self.ended for name in self.pulling):
            self.is_connected = True
            self.puller_says(self.receiver.connected(KEY, QUERY, 2, self.now))

    def disconnect(self) -> None:
        self.is_connected = False
        self.to_source.clear()
        self.to_puller.clear()
        self.sender.disconnected(PEER, self.now)
        self.puller_says(self.receiver.disconnected(KEY, "the connection broke", self.now))

    def deliver(self, number: int, copies: int) -> None:
        """One of the messages under way, any of them, arrives `copies` times: 0 is lost."""
        box = [self.to_source, self.to_puller][number % 2]
        if not box:
            return
        message = box.pop(number // 2 % len(box))
        for _ in range(copies):
            match message:
                case QueryBlocks() | ReadBlocks() | PullDone():
                    self.source_says(self.sender.receive(PEER, message, self.now))
                case BlocksReady() | TransferEnded():
                    self.puller_says(self.receiver.receive(KEY, message, self.now))
                case (int() as read_id, contents):
                    self.receive(read_id, contents)

    def receive(self, read_id: int, contents: list[bytes] | None) -> None:
        """A read begins to be written, from the source's memory as it is now if it brings no contents."""
        fetch = self.receiver.start_read(read_id, self.now)
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
            self.puller_says(self.receiver.end_read(fetch.read_id, problem, self.now))

    def check(self) -> None:
        """Begin with a checksum, or end with the one begun."""
        if self.checking is not None:
            (name, block), self.checking = self.checking, None
            self.source_says(self.sender.checked(name, [self.contents(block)], self.now))
        elif self.checks:
            name, block = self.checks.pop(0)
            if self.sender.start_check(name):
                assert name not in self.released
                self.checking = name, block

    def send(self) -> None:
        if self.sends:
            sent = self.sends.pop(0)
            self.to_puller.append((sent.read_id, [self.contents(block) for block in sent.blocks]))
            self.source_says(self.sender.sent(sent.transfer_id, self.now))

    def copy(self, number: int) -> None:
        if self.copies:
            self.receive(self.copies.pop(number % len(self.copies)), None)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.source_says(self.sender.tick(self.now))
        self.puller_says(self.receiver.tick(self.now))

    def work(self) -> None:
        """Let the threads run until they are idle."""
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
            world.connect()
        case "release":
            world.puller_says(world.receiver.release(f"t{transfer}", world.now))
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
        case "disconnect":
            world.disconnect()


ACTIONS = st.sampled_from(  # mostly without faults, so that transfers get far
    ("publish", "complete", "withdraw", "pull", "release", "release", "check", "check", "send", "copy", "land", "work")
    + ("deliver",) * 8
    + ("lose", "double", "double", "wait", "disconnect")
)


@pytest.mark.parametrize("maps_memory", [False, True], ids=["over the connection", "mapped memory"])
@given(script=st.lists(st.tuples(ACTIONS, st.integers(0, 31)), min_size=50, max_size=90))
@settings(max_examples=250, deadline=None)
def test_every_transfer_ends_and_reads_only_published_contents(
    maps_memory: bool, script: list[tuple[str, int]]
) -> None:
    world = World(maps_memory)
    world.pull(0, 1)
    world.connect()
    world.publish(0, 3, None)
    for action, number in script:
        act(world, action, number)
    for transfer in range(NUM_TRANSFERS):  # an engine completes or withdraws what it published
        if f"t{transfer}" in world.published and f"t{transfer}" not in world.completed:
            world.withdraw(transfer)
    for _ in range(20):
        world.work()
        world.to_source.clear()
        world.to_puller.clear()
        world.pass_time(LEASE / 2)
    assert set(world.ended) == set(world.pulling)
    assert set(world.released) == set(world.published)
    assert world.sender.num_transfers == world.receiver.num_pulls == 0
    assert world.sender.next_deadline is None
    assert world.receiver.next_deadline is None


@pytest.mark.parametrize("maps_memory", [False, True], ids=["over the connection", "mapped memory"])
@given(
    sizes=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    skip=st.integers(0, 5),
    order=st.lists(st.integers(0, 31), min_size=60, max_size=60),
    lost=st.sets(st.integers(0, 12), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_late_and_repeated_messages_complete_the_pull(
    maps_memory: bool, sizes: list[int], skip: int, order: list[int], lost: set[int]
) -> None:
    """Messages of one direction in any order, and a few queries lost."""
    world = World(maps_memory)
    world.pull(0, skip)
    world.connect()
    for size in sizes:
        world.publish(0, size, None)
        world.check()
    world.publish(0, NUM_BLOCKS, b"t0")
    for turn, number in enumerate(order):
        world.work()
        if turn in lost:
            world.to_source = [message for message in world.to_source if not isinstance(message, QueryBlocks)]
        world.deliver(2 * number, 1)
        world.deliver(2 * number + 1, 1)
        if world.ended:
            break
        world.pass_time(QUERY)
    assert world.ended == {"t0": Pulled("t0", b"t0")}
    world.puller_says(world.receiver.release("t0", world.now))
    for _ in order:
        world.deliver(0, 1)
        world.deliver(1, 1)
    assert world.released == {"t0": False}


def published(count: int, payload: bytes | None = b"") -> Sender:
    """Return a sender with transfer "a" of `count` blocks, checked at time 0."""
    machine = Sender(LEASE)
    machine.publish("a", range(count), payload, 0.0)
    for block in range(count):
        assert machine.start_check("a")
        machine.checked("a", [block.to_bytes(8, "big")], 0.0)
    return machine


def test_the_lease_runs_from_the_last_publish_and_any_contact_renews_it() -> None:
    machine = published(2, payload=None)
    assert machine.next_deadline is None, "the engine may still publish"
    machine.publish("a", [], b"", 100.0)
    assert machine.tick(159.9) == []
    machine.receive(PEER, QueryBlocks("a", 2, True), 159.9)
    assert machine.tick(219.8) == []
    (read,) = machine.receive(PEER, ReadBlocks("a", 0, 0, 2), 219.8)
    assert isinstance(read, sender.SendBlocks)
    assert Released("a", True) not in machine.tick(1000.0), "a read is under way"
    machine.sent("a", 1000.0)
    assert machine.tick(1059.9) == []
    outputs = machine.tick(1060.0)
    assert outputs[-1] == Released("a", was_expired=True)
    assert [type(output.message) for output in outputs[:-1] if isinstance(output, sender.Send)] == [TransferEnded]


def test_withdrawn_blocks_wait_for_a_puller_that_maps_them() -> None:
    machine = published(2)
    machine.receive(PEER, QueryBlocks("a", 0, False), 0.0)
    (told,) = machine.withdraw("a", "aborted", 1.0)
    assert told == sender.Send(PEER, TransferEnded("a", "aborted"))
    assert machine.receive(PEER, PullDone("a"), 2.0) == [Released("a", was_expired=False)]


def test_a_transfer_cancelled_before_it_is_published_is_released_at_once() -> None:
    machine = Sender(LEASE)
    machine.receive(PEER, QueryBlocks("a", 0, False), 0.0)
    assert machine.receive(PEER, PullDone("a"), 0.0) == []
    assert machine.publish("a", [1], None, 1.0) == [Released("a", was_expired=False)]
    assert machine.publish("a", [2], b"", 1.0) == []


def test_reads_of_blocks_that_are_not_ready_are_refused() -> None:
    machine = published(3)
    for first, count in ((0, 4), (3, 1), (1 << 39, 1)):
        (output,) = machine.receive(PEER, ReadBlocks("a", 0, first, count), 0.0)
        assert isinstance(output, sender.Send)
        assert isinstance(output.message, TransferEnded)
