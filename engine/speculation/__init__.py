"""Speculative decoding: proposers of draft tokens, and the choice of how many.

Reading order: `speculator`, `ngram`, `draft_model`, `draft_loop`, `controller`."""
