"""KV blocks from one engine process into another's pages, in background threads, while both go on stepping.

Reading order: `interface` (what an engine sees), `offers` and `pulls` (the protocol, as two pure state machines),
`messages`, `handshake` and `wire` (how they talk), `pages` (whose bytes move), `server` and `link` (the threads of
either side), `transfers` (all of it behind one class). The class is in `engine.transfer.transfers`, because it needs
torch.
"""

from dispec.engine.transfer.interface import Event, Pulled, PullFailed, Released, RemoteBlocks, TransferOptions

__all__ = ["Event", "PullFailed", "Pulled", "Released", "RemoteBlocks", "TransferOptions"]
