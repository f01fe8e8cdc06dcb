"""Compiles the grammars of requests with llguidance, which computes token masks in tens of microseconds."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from threading import BoundedSemaphore, Lock

from llguidance import LLMatcher, LLTokenizer

from dispec.engine.errors import InvalidField
from dispec.engine.structured_output.closing_plan import ClosingPlanner
from dispec.engine.structured_output.grammar_state import GrammarState
from dispec.engine.structured_output.grammar_text import explain, fixed_texts, grammar_text
from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.engine.structured_output.tables import Vocabulary, new_matcher
from dispec.engine.structured_output.trial_process import TrialProcess

MAX_COMPILATIONS = 2  # at once; each has a process for trials
_CACHE_SIZE = 256  # grammars, and errors of others
_MAX_TOKENS = 2**31 - 1  # of a plan: a request may have fewer


class Grammar:
    """A compiled grammar. Sequences start from copies of its state.

    matcher, planner: None for a free answer after reasoning of limited length.
    eos_token_id: ends an output where the grammar lets it end.
    """

    def __init__(
        self,
        matcher: LLMatcher | None,
        structure: StructuredOutputs,
        eos_token_id: int,
        planner: ClosingPlanner | None,
    ) -> None:
        self._matcher = matcher
        self._structure = structure
        self._eos_token_id = eos_token_id
        self._planner = planner
        self._plan = () if matcher is None or planner is None else planner.plan(matcher, _MAX_TOKENS)
        self._too_few_tokens = 0  # for which no plan was found

    def start(self, max_tokens: int) -> GrammarState:
        """Return the state of a sequence before its first output token. max_tokens: of the output.

        Raises InvalidField if the shortest output that is known has more tokens.
        """
        state = self._start(max_tokens)
        completion = state.completion
        if self._matcher is None or completion is None or len(completion) <= max_tokens:
            return state
        if self._planner is not None and max_tokens > self._too_few_tokens:
            reasoning = len(completion) - len(self._plan or ())
            shorter = self._planner.plan(self._matcher, max_tokens - reasoning)
            if shorter is not None:
                self._plan = shorter
                return self._start(max_tokens)
            self._too_few_tokens = max_tokens
        raise InvalidField(
            "max_tokens",
            f"max_tokens or what the context leaves of it is {max_tokens}, must be at least {len(completion)}: no"
            " shorter output of the grammar is known",
        )

    def _start(self, max_tokens: int) -> GrammarState:
        return GrammarState(
            None if self._matcher is None else self._matcher.deep_copy(),
            self._eos_token_id,
            reasoning_start=self._structure.reasoning_start_token_ids,
            reasoning_end=self._structure.reasoning_end_token_ids,
            reasoning_max_tokens=self._structure.reasoning_max_tokens,
            max_tokens=max_tokens,
            planner=self._planner,
            plan=self._plan,
        )


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last ones. Safe to share between threads.

    tokenizer_path: of `tokenizer.json`; None for a model without one, for which every grammar is refused.
    vocab_size: of the logits, padding included.
    eos_token_ids: tokens that end an output where the grammar lets it end.
    """

    def __init__(self, tokenizer_path: str | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._vocabulary = None if tokenizer_path is None else Vocabulary(tokenizer_path, vocab_size, eos_token_ids)
        self._closing_planner: ClosingPlanner | None = None
        self._tables: LLTokenizer | None = None
        self._grammars: OrderedDict[StructuredOutputs, Grammar | str] = OrderedDict()
        self._trials: list[TrialProcess] = []  # idle ones
        self._num_compilations = BoundedSemaphore(MAX_COMPILATIONS)
        self._lock = Lock()
        self._tables_lock = Lock()

    def find(self, structure: StructuredOutputs) -> Grammar | None:
        """Return the grammar if it is compiled. Raises InvalidField if it was refused."""
        with self._lock:
            found = self._grammars.get(structure)
            if found is not None:
                self._grammars.move_to_end(structure)
        if isinstance(found, str):
            raise structure.error(found)
        return found

    def compile(self, structure: StructuredOutputs) -> Grammar:
        """Return the grammar of a structure. The first call takes a second, because it builds the tokenizer's tables.

        Raises InvalidField for a grammar that is wrong, that cannot be enforced, or that exceeds a limit.
        """
        known = self.find(structure)
        if known is not None:
            return known
        if self._vocabulary is None:
            raise structure.error("must be left out for a model without a tokenizer")
        if structure.kind is None:
            return Grammar(None, structure, self._read_tables().eos_token, None)
        text = grammar_text(structure)
        with self._num_compilations:
            found = self.find(structure) or self._compile(structure, text)
        with self._lock:
            self._grammars[structure] = found
            while len(self._grammars) > _CACHE_SIZE:
                self._grammars.popitem(last=False)
        if isinstance(found, str):
            raise structure.error(found)
        return found

    def close(self) -> None:
        """End the processes of trials."""
        with self._lock:
            while self._trials:
                self._trials.pop().close()

    def _compile(self, structure: StructuredOutputs, text: str) -> Grammar | str:
        """Return the grammar, or why it is refused."""
        tables, planner = self._read_tables(), self._planner()
        without_tokens = next((one for one in fixed_texts(structure) if not planner.can_write(one)), None)
        if without_tokens is not None:
            return f"holds {without_tokens:.60}, for which the model has no tokens"
        with self._trial() as trial:
            refusal = trial.compile(text)
        if refusal is not None:
            return refusal
        matcher = new_matcher(tables, text)
        if matcher.is_error():
            return explain(structure, matcher.get_error())
        return Grammar(matcher, structure, tables.eos_token, planner)

    @contextmanager
    def _trial(self) -> Iterator[TrialProcess]:
        with self._lock:
            assert self._vocabulary is not None
            trial = self._trials.pop() if self._trials else TrialProcess(self._vocabulary)
        try:
            yield trial
        finally:
            with self._lock:
                self._trials.append(trial)

    def _read_tables(self) -> LLTokenizer:
        assert self._vocabulary is not None
        with self._tables_lock:
            if self._tables is None:
                try:
                    self._tables = self._vocabulary.tables()
                except ValueError as error:
                    said = f"structured outputs need a tokenizer that llguidance can read: {error!s:.200}"
                    raise InvalidField("structured_outputs", said) from None
            return self._tables

    def _planner(self) -> ClosingPlanner:
        tables = self._read_tables()
        with self._lock:
            if self._closing_planner is None:
                assert self._vocabulary is not None
                self._closing_planner = ClosingPlanner(tables, self._vocabulary.size)
            return self._closing_planner
