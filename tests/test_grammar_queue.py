"""Requests whose grammars are being compiled: what comes meanwhile is kept, and aborted ones are left out."""

import select
import threading

from dispec.engine.errors import InvalidField
from dispec.engine.process.grammar_queue import CompiledRequest, GrammarQueue
from dispec.engine.process.messages import Resume, Submit
from dispec.engine.structured_output.grammar_compiler import Grammar, GrammarCompiler
from dispec.engine.structured_output.structured_outputs import StructuredOutputs


class GatedCompiler(GrammarCompiler):
    """Compiles nothing before the gate opens. compiled: the regular expressions that it was asked for."""

    def __init__(self) -> None:
        super().__init__(None, 64, ())
        self.gate = threading.Event()
        self.compiled: list[str | None] = []

    def compile(self, structure: StructuredOutputs) -> Grammar:
        assert self.gate.wait(60)
        self.compiled.append(structure.regex)
        if structure.regex == "wrong":
            raise structure.error("is wrong")
        return Grammar(None, structure, 0, None)


def take(queue: GrammarQueue, count: int) -> list[CompiledRequest]:
    found: list[CompiledRequest] = []
    while len(found) < count:
        assert select.select([queue], [], [], 60)[0]
        found += queue.take()
    return found


def test_aborted_requests_are_not_compiled_and_others_keep_their_messages() -> None:
    compiler = GatedCompiler()
    queue = GrammarQueue(compiler)
    for key in ("a", "wrong", "gone", "b"):
        queue.add(Submit(key, [1], {}), StructuredOutputs(regex=key))
    assert queue.take() == []
    assert "gone" in queue
    queue.abort("gone")
    queue.resume(Resume("b", [[7]]))
    compiler.gate.set()
    done = {request.submit.request_id: request for request in take(queue, 3)}
    assert done["a"].grammar is not None
    assert (done["a"].error, done["a"].resume) == (None, None)
    assert isinstance(done["wrong"].error, InvalidField)
    assert done["b"].grammar is not None
    assert done["b"].resume == Resume("b", [[7]])
    assert sorted(map(str, compiler.compiled)) == ["a", "b", "wrong"]
    assert len(queue) == 0
    assert not select.select([queue], [], [], 0)[0]
