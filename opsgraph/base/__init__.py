"""What all of opsgraph stands on: the environment, the backends, the one error family."""
