"""Structured output: grammars that restrict the tokens of a sequence. Imports no torch."""
