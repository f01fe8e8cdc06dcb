"""The `dispec` command."""
