"""What a process holds through descriptors: one module a kind."""
