"""The progress bar of `LLM.generate`."""

import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

from dispec.engine.api.call import Call


class Progress:
    """A bar of finished prompts, with the tokens per second of input and output so far.

    use_tqdm: None draws the bar in a terminal and in a notebook.
    """

    def __init__(self, num_prompts: int, use_tqdm: bool | None) -> None:
        is_shown = (sys.stderr.isatty() or _is_notebook()) if use_tqdm is None else use_tqdm
        # miniters 0: the rates change between two finished prompts. At most ten times a second it draws.
        self._bar = tqdm(
            total=num_prompts, desc="generating", unit="prompt", dynamic_ncols=True, miniters=0, disable=not is_shown
        )
        self._start = time.perf_counter()

    def update(self, call: Call) -> None:
        """Show what a call has done."""
        if self._bar.disable:
            return
        seconds = time.perf_counter() - self._start
        rates = (call.num_prompt_tokens / seconds, call.num_output_tokens / seconds)
        self._bar.set_postfix_str("input {:.0f} tokens/s, output {:.0f} tokens/s".format(*rates), refresh=False)
        self._bar.update(len(call.requests) - call.num_open - self._bar.n)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.close()


def _is_notebook() -> bool:
    """Return whether this is a Jupyter kernel, whose stderr is no terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
