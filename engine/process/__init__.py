"""The engine as a process of its own, as the server runs it.

Reading order: `messages`, `channel`, `engine_loop`."""
