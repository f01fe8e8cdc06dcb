"""OpenAI's Responses API over the chats of `serving.api.chat_generation`."""
