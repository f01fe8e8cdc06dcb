"""From a model's name to its config, weights and tokenizer files.

Reading order: `model_source`, `checkpoint`, `gguf_file`, `tokenizer_files`.
"""
