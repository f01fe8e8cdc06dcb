"""The engine as a process of its own, with which the server communicates by messages.

Reading order: `messages`, `channel`, `engine_loop`."""
