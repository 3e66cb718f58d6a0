"""What another distribution can bring: nothing is imported here, entry points name the classes."""
