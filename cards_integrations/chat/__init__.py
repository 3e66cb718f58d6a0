"""What a chat is made of: messages, templates, tools and their formats, grammars, stop strings."""
