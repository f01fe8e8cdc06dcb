"""Chooses the sequences and the number of their tokens in each step. Loads no torch.

Reading order: `sequence`, `scheduler_output`, `scheduler`, `kv_cache_manager`, `block_pool`."""
