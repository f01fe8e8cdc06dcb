"""The Python API: `LLM`, its outputs, and the sharing of one engine between threads."""
