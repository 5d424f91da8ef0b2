"""From photos and prompts to the samples of each step. Imports command_line, processes and model."""
