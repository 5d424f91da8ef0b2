"""What takes a step: optimizer and plugin, in one precision or another. Imports all but run."""
