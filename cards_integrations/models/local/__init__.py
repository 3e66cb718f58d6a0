"""Language models on this machine: settings, loading, and candidates in one running batch."""
