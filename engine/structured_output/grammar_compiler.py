"""Compiles the grammars of requests with llguidance, which computes token masks in tens of microseconds."""

from collections import OrderedDict
from threading import Lock

from llguidance import LLMatcher, LLTokenizer, grammar_from

from dispec.engine.errors import InvalidField
from dispec.engine.structured_output.closing_plan import ClosingPlanner
from dispec.engine.structured_output.grammar_state import GrammarState
from dispec.engine.structured_output.structured_outputs import StructuredOutputs

_CACHE_SIZE = 256  # grammars
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

    def start(self, max_tokens: int) -> GrammarState:
        """Return the state of a sequence before its first output token. max_tokens: of the output.

        Raises InvalidField if the shortest output that is known has more tokens.
        """
        state = GrammarState(
            None if self._matcher is None else self._matcher.deep_copy(),
            self._eos_token_id,
            reasoning_start=self._structure.reasoning_start_token_ids,
            reasoning_end=self._structure.reasoning_end_token_ids,
            reasoning_max_tokens=self._structure.reasoning_max_tokens,
            max_tokens=max_tokens,
            planner=self._planner,
            plan=self._plan,
        )
        completion = state.completion
        if self._matcher is not None and completion is not None and len(completion) > max_tokens:
            raise InvalidField(
                "max_tokens",
                f"max_tokens or what the context leaves of it is {max_tokens}, must be at least {len(completion)}: no"
                " shorter output of the grammar is known",
            )
        return state


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps the last ones. Safe to share between threads.

    tokenizer_json: the contents of `tokenizer.json`; None for a model without one, for which every grammar is refused.
    vocab_size: of the logits, padding included.
    eos_token_ids: tokens that end an output where the grammar lets it end.
    """

    def __init__(self, tokenizer_json: str | None, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer: LLTokenizer | None = None
        self._closing_planner: ClosingPlanner | None = None
        self._grammars: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()
        self._lock = Lock()

    def find(self, structure: StructuredOutputs) -> Grammar | None:
        """Return the grammar if it is compiled."""
        with self._lock:
            found = self._grammars.get(structure)
            if found is not None:
                self._grammars.move_to_end(structure)
            return found

    def compile(self, structure: StructuredOutputs) -> Grammar:
        """Return the grammar of a structure. Raises InvalidField for a grammar that is wrong or too large."""
        found = self.find(structure)
        if found is not None:
            return found
        if self._tokenizer_json is None:
            raise structure.error("must be left out for a model without a tokenizer")
        if structure.kind is None:
            return Grammar(None, structure, self._tables().eos_token, None)
        matcher = LLMatcher(self._tables(), _grammar_text(structure), log_level=0)
        if matcher.is_error():
            raise structure.error(f"{matcher.get_error():.300}")
        grammar = Grammar(matcher, structure, self._tables().eos_token, self._planner())
        with self._lock:
            self._grammars[structure] = grammar
            while len(self._grammars) > _CACHE_SIZE:
                self._grammars.popitem(last=False)
        return grammar

    def _tables(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                assert self._tokenizer_json is not None
                eos = list(self._eos_token_ids) or None
                self._tokenizer = LLTokenizer(self._tokenizer_json, n_vocab=self._vocab_size, eos_token=eos)
            return self._tokenizer

    def _planner(self) -> ClosingPlanner:
        tables = self._tables()
        with self._lock:
            if self._closing_planner is None:
                self._closing_planner = ClosingPlanner(tables, self._vocab_size)
            return self._closing_planner


def _grammar_text(structure: StructuredOutputs) -> str:
    if structure.json is not None:
        return grammar_from("json_schema", str(structure.json))
    if structure.json_object:
        return grammar_from("json_schema", '{"type": "object"}')
    if structure.regex is not None:
        return grammar_from("regex", structure.regex)
    if structure.choice is not None:
        return grammar_from("choice", list(structure.choice))  # type: ignore[arg-type]
    if structure.grammar is not None:
        return grammar_from("grammar", structure.grammar)
    raise structure.error("is not supported yet")
