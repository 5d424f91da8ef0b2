"""The processes of a run: who is who, how they meet, what ends them, threads within one. Imports command_line."""
