"""Anthropic's Messages API over the chats of `serving.api.chat_generation`."""
