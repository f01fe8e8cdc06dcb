"""Text to token ids and back. Loads no torch: the server's own process tokenizes.

Reading order: `tokenizer`, `detokenizer`, `text_stream`, `chat_messages`, `chat_template`, `special_token_marker`."""
