"""The machine's resources: cores, threads, directories for caches and temporary files."""
