"""What the machine offers to a process: cores, threads, directories for caches and temporary files."""
