"""Clients of engine processes: requests go in, streams of updates come out."""
