"""Which sequences compute how many tokens in the next step. Loads no torch.

Reading order: `sequence`, `block_pool`, `scheduler_output`, `scheduler`."""
