"""The server's side of an engine process: requests in, streams of updates out."""
