"""Stable Diffusion: its folder, its parts, what is trained of them, the loss. Imports command_line and processes."""
