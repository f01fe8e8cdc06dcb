"""KV blocks move from one engine process into another's cache, in background threads, while both keep stepping.

The source is the engine that computed a prompt; the puller connects to it and reads the prompt's blocks.

Reading order: `kv_connector` (what the engine calls), `interface` (events and options), `transfer_engine` (publish,
pull, poll, release), `sender` (the source's state machine) and `receiver` (the puller's), `messages`, `handshake` and
`connection` (the wire), `transports` and `kv_blocks` (how bytes are read), `server` and `client` (the threads).
"""
