"""Text to token ids and back. Loads no torch: the server's own process tokenizes.

Reading order: `tokenizer`, `chat_template`, `detokenizer`, `text_stream`."""
