"""The parts of a chat: messages, templates, tools and their formats, grammars, stop strings."""
