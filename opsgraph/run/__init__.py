"""Modules that find a plan for a call and run it, eagerly or under torch.compile."""
