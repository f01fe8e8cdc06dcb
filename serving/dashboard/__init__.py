"""The live dashboard: its state, its events and its page."""
