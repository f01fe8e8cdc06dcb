"""KV blocks move from one engine process into another's cache, in background threads, while both keep stepping.

Reading order: `kv_connector` (what the engine calls), `interface` (events and options), `transfer_engine` (publish,
pull, poll, release), `sender` and `receiver` (the protocol as two state machines), `messages`, `handshake` and
`connection` (the wire), `transports` and `kv_blocks` (how bytes are read), `server` and `client` (the threads).
"""
