"""`dispec chat`: a conversation in a terminal, or through a pipe with one question a line."""
