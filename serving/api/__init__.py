"""The OpenAI-compatible routes, their requests and answers."""
