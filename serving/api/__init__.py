"""The OpenAI-compatible API. Reading order: `routes_chat`, `prompts`, `sampling`, `generation`, `responses`."""
