"""A process that fills the compile cache for an engine that runs meanwhile: `python -m engine.compile_ahead`.

Standard input brings the order in its first line, and ends when the engine does: then so does this process, at once
and with the compilers that it started. What it had finished is kept. It says why it failed, if it does, in one line.
The model's weights are not loaded a second time: one layer of dummies and the tables stand for them.
"""

import os
import signal
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from engine.compile_cache import Order, marker

if TYPE_CHECKING:
    from engine.compile_pieces import ModelParts

_NICENESS = 10  # it shall not take the engine's cores, nor wait for ever while the engine is busy
_NUM_BLOCKS = 29  # any number that no size of a warm-up has


def fill_cache(order: Order) -> None:
    """Compile all of an order, and mark it as done. Raises whatever the compiler does."""
    import torch

    from engine.compile_pieces import compile_pieces
    from engine.compiled_model import first_cause

    torch.set_num_threads(order.threads)
    try:
        with torch.inference_mode():
            pieces = compile_pieces(
                _parts(order) if order.with_model else None,
                order.config.vocab_size,
                order.block_size,
                order.max_num_seqs,
            )
            for _ in pieces:
                pass
    except Exception as error:
        raise RuntimeError(first_cause(error)) from error
    marker(order).touch()


def _parts(order: Order) -> "ModelParts":
    import torch

    from engine.compile_pieces import ModelParts
    from engine.compiled_model import eager_functions
    from engine.memory import KVPlan, allocate_kv_cache
    from engine.options import DTYPES
    from engine.step_inputs import chosen_rows
    from layers.weights import dummy_weights

    config, dtype, device = replace(order.config, num_layers=1), DTYPES[order.dtype], torch.device("cpu")
    (layer,) = allocate_kv_cache(config, KVPlan(_NUM_BLOCKS, order.block_size, 0, 0, ""), dtype, device)
    chosen = torch.zeros(chosen_rows(order.max_num_seqs), dtype=torch.int64) if order.overlaps else None
    return ModelParts(eager_functions(config), dummy_weights(config, dtype, device), layer, chosen)


def _end_with_the_engine() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGKILL)  # a session of its own, so the group is this process and its compilers


def main() -> None:
    os.nice(_NICENESS)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    threading.Thread(target=_end_with_the_engine, daemon=True).start()
    code = 0
    try:
        fill_cache(order)
    except Exception as error:
        print(error, flush=True)
        code = 1
    os._exit(code)


if __name__ == "__main__":
    main()
