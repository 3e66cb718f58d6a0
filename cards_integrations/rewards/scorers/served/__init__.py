"""Reward models behind HTTP: what each protocol sends, and how it reads the reply."""
