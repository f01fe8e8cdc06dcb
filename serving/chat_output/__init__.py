"""The output of a chat model, split into reasoning, content and tool calls."""
